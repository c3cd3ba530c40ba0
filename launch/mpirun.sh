#!/usr/bin/env bash
# Run a command on several nodes with mpirun: inside an allocation, or with a file of host names.
#   launch/mpirun.sh python -m hpcinfer.run --model ...
#   HPCINFER_HOSTFILE=hosts HPCINFER_RANKS_PER_NODE=4 launch/mpirun.sh python -m hpcinfer.run --model ...
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mpirun=${HPCINFER_MPIRUN:-mpirun}                  # launcher of the MPI that mpi4py loads
hostfile=${HPCINFER_HOSTFILE:-}                    # one host name a line; without it the allocation decides
per_node=${HPCINFER_RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-1}}  # ranks on each node
tolerant=${HPCINFER_FAULT_TOLERANCE:-no}           # yes: the other ranks go on when one dies (Open MPI 5, over TCP)
threads=${HPCINFER_THREADS:-${SLURM_CPUS_PER_TASK:-1}}  # cores of each rank
read -r -a more <<<"${HPCINFER_MPIRUN_FLAGS:-}"    # anything that the site needs, as --mca btl_tcp_if_include NAME

if [ $# -eq 0 ]; then
    echo "usage: launch/mpirun.sh COMMAND [ARGUMENT ...]" >&2
    exit 2
fi
export HPCINFER_THREADS=$threads
if [[ $("$mpirun" --version 2>&1) == *"Open MPI"* ]]; then
    flags=(--map-by "ppr:$per_node:node:pe=$threads" -x PATH -x HPCINFER_THREADS)
    [ -z "$hostfile" ] || flags+=(--hostfile "$hostfile")
    [ "$tolerant" != yes ] || flags+=(--with-ft ulfm --mca pml ob1)
else
    nodes=${SLURM_NNODES:-1}
    [ -z "$hostfile" ] || nodes=$(grep -c '[^[:space:]]' "$hostfile")
    flags=(-ppn "$per_node" -n "$((nodes * per_node))")
    [ -z "$hostfile" ] || flags+=(-f "$hostfile")
fi
exec "$mpirun" "${flags[@]}" "${more[@]}" "$here/bind.sh" "$@"
