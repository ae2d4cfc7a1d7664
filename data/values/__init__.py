"""What a record is made of: columns and their schema, and how each kind of value is read."""
