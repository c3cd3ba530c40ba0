"""Arrays of GPUs between ranks: through NCCL or RCCL, or through the MPI."""
