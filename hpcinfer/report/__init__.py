"""What a run measured: phases, counters, the report."""
