"""Supervision: the replicas of a job as MPI steps of their own, watched from outside of MPI."""
