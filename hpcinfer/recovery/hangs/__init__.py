"""Ranks that hang: found by a watchdog, explained by an autopsy, treated as dead."""
