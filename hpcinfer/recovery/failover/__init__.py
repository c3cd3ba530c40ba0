"""A rank's life in a job that may lose some: members, survivors, spare ranks; above all else of recovery."""
