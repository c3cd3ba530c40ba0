"""The store: schema, conversion, reading."""
