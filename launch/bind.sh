#!/usr/bin/env bash
# Start one rank with its threads set; goes between the launcher and Python:
#   mpirun -n 4 launch/bind.sh python -m hpcinfer.run ...
set -euo pipefail
threads=${HPCINFER_THREADS:-${SLURM_CPUS_PER_TASK:-}}  # per rank; if not set, the cores that the launcher gave to it
numa=${HPCINFER_NUMA:-no}                          # yes: pin rank i of a node to memory domain i (numactl)

local_rank=${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-${PMI_LOCAL_RANK:-${SLURM_LOCALID:-0}}}}
threads=${threads:-$(nproc)}
export OMP_NUM_THREADS=$threads MKL_NUM_THREADS=$threads OPENBLAS_NUM_THREADS=$threads
if [ "$numa" = yes ]; then
    domains=$(find /sys/devices/system/node -maxdepth 1 -name 'node[0-9]*' | wc -l)
    domain=$((local_rank % (domains > 0 ? domains : 1)))
    exec numactl --cpunodebind="$domain" --membind="$domain" "$@"
fi
exec "$@"
