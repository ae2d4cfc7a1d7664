"""A whole federation on one machine: engines, scenarios, the report."""
