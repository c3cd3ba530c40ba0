#!/usr/bin/env bash
# A real Slurm of N nodes on this machine, to try batch jobs: no systemd, everything in one folder, ended by process id.
#   eval "$(slurm/cluster.sh up 4)"     sbatch ...     slurm/cluster.sh down
# `up` again starts what is missing, as a node that was killed. The nodes are called n0, n1, ...
set -euo pipefail
dir=${HPCINFER_CLUSTER_DIR:-${TMPDIR:-/tmp}/hpcinfer-slurm-$(id -un)}  # a short path: it holds a socket
port=${HPCINFER_CLUSTER_PORT:-16817}               # of slurmctld; node i listens at this + 1 + i
cpus=${HPCINFER_CLUSTER_CPUS:-4}                   # that each node says it has
pmix=${HPCINFER_CLUSTER_PMIX:-$(find /usr/lib -path '*/pmix2/lib/libpmix.so.2' -print -quit)}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin

fail() { printf 'slurm/cluster.sh: %s\n' "$@" >&2; exit 1; }
is_alive() { grep -qs '^State:.[^Z]' "/proc/$(cat "$1" 2>/dev/null)/status"; }  # the file may go at any time
num_up() { timeout 5 sinfo --noheader --Node --states=idle,mixed,allocated 2>/dev/null | wc -l; }

up() {  # nodes 0 ... $1
    mkdir -p "$dir"/{state,log,run} && chmod 755 "$dir" "$dir/run"
    conf=$(sed "s|@DIR@|$dir|; s|@PORT@|$port|; s|@PORTS@|$((port + 1))-$((port + 1 + $1))|; s|@LAST@|$1|
        s|@CPUS@|$cpus|; s|@USER@|$(id -un)|; s|@HOST@|$(hostname -s)|" "$here/cluster.conf")
    ! is_alive "$dir/run/slurmctld.pid" || [ "$conf" = "$(<"$SLURM_CONF")" ] \
        || fail "another one is up in $dir" "  hint: $0 down"
    echo "$conf" >"$SLURM_CONF"
    printf 'Name=gpu File=/dev/%s\n' null zero >"$dir/gres.conf"
    if [ -n "$pmix" ] && [ ! -e "${pmix%.2}" ]; then   # Slurm loads it by a name that only libpmix-dev brings
        ln -s "${pmix##*/}" "${pmix%.2}" && echo "${pmix%.2}" >"$dir/run/link"
    fi
    if ! is_alive "$dir/run/munged.pid"; then
        (umask 077 && head -c 128 /dev/urandom >"$dir/run/munge.key")
        munged --force --num-threads=2 --key-file="$dir/run/munge.key" --socket="$dir/run/munge.sock" \
            --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"
    fi
    is_alive "$dir/run/slurmctld.pid" || slurmctld
    for i in $(seq 0 "$1"); do
        is_alive "$dir/run/slurmd.n$i.pid" || { mkdir -p "$dir"/{spool,tmp}/n"$i" && slurmd -N "n$i"; }
    done
    for _ in $(seq 100); do [ "$(num_up)" -le "$1" ] || break; sleep 0.2; done
    [ "$(num_up)" -gt "$1" ] || fail "not all nodes came up" "$(tail -n 3 "$dir"/log/slurm*.log)"
    echo "export SLURM_CONF=$SLURM_CONF"
}

end() {  # processes, by their files
    for file in "$@"; do ! is_alive "$file" || kill "$(cat "$file")" || true; done
    for file in "$@"; do
        for _ in $(seq 80); do is_alive "$file" || break; sleep 0.1; done
        ! is_alive "$file" || kill -9 "$(cat "$file")" || true
    done
}

case "${1:-} ${2:-}" in
    up\ [1-9]*) up $(($2 - 1)) ;;
    down\ )
        timeout 5 scancel --user="$(id -un)" 2>/dev/null || true
        for _ in $(seq 100); do [ -n "$(timeout 5 squeue --noheader 2>/dev/null)" ] || break; sleep 0.1; done
        end "$dir"/run/slurmd.*.pid "$dir/run/slurmctld.pid"
        end "$dir/run/munged.pid"
        [ ! -s "$dir/run/link" ] || rm -f "$(<"$dir/run/link")"
        rm -rf "$dir"/{state,spool,tmp,run} ;;         # the logs stay
    *) echo "usage: slurm/cluster.sh up NODES | down" >&2; exit 2 ;;
esac
