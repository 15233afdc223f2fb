"""Keep a record, or drop it with a reason."""
