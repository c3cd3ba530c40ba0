"""The only importer of mpi4py: world, groups, collectives, tree all-reduce."""
