"""A decoder-only transformer over the kernel protocol; families differ only in data."""
