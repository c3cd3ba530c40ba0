"""The job directory: index, claims, leases, journal, merge."""
