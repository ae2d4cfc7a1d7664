"""What is written for people: tables, charts, reports, model cards, schemas."""
