#!/usr/bin/env bash
# Run a command as one job step with srun, inside an allocation: launch/srun.sh python -m hpcinfer.run --model ...
# The allocation says how many nodes, tasks and cores; srun hands out the ranks without mpirun.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
srun=${HPCINFER_SRUN:-srun}
mpi=${HPCINFER_SRUN_MPI:-pmix}                     # pmix for Open MPI, pmi2 for MPICH (`srun --mpi=list` shows what there is)
bind=${HPCINFER_SRUN_BIND:-cores}                  # --cpu-bind
threads=${HPCINFER_THREADS:-${SLURM_CPUS_PER_TASK:-1}}  # cores of each rank
read -r -a more <<<"${HPCINFER_SRUN_FLAGS:-}"      # anything that the site needs

if [ $# -eq 0 ]; then
    echo "usage: launch/srun.sh COMMAND [ARGUMENT ...]" >&2
    exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
    printf '%s\n' "launch/srun.sh: no allocation" "  hint: salloc first, or sbatch slurm/hpcinfer.sbatch" >&2
    exit 2
fi
export HPCINFER_THREADS=$threads
exec "$srun" --mpi="$mpi" --cpus-per-task="$threads" --cpu-bind="$bind" "${more[@]}" "$here/bind.sh" "$@"
