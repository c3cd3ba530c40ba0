"""Pure integer arithmetic: the mesh, the grains, who holds what. No MPI, no arrays."""
