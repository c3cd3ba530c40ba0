#!/usr/bin/env bash
# Hosts out of namespaces: each has a network, a name, /dev/shm and IPC of its own; they share files and users.
# Each process tree that `agent` starts, as ssh would, has process numbers and temporary files of its own, too.
#   launch/virtual_cluster.sh up 4 100 1000          hosts vh0 to vh3; each link delays by 100 us and passes 1000 Mbit/s
#   launch/virtual_cluster.sh hostfile 2             for mpiexec, with so many slots on each
#   launch/virtual_cluster.sh exec vh0 mpiexec --prtemca plm_ssh_agent "$PWD/launch/virtual_cluster.sh agent" ...
#   launch/virtual_cluster.sh cut vh2 | heal vh2 | link 1000 0 (no limit) | kill vh2 (all its processes) | down
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dir=${HPCINFER_CLUSTER:-${TMPDIR:-/tmp}/hpcinfer-cluster}  # its state; one cluster for each
net=${HPCINFER_CLUSTER_NET:-10.77.0}                       # vhN is $net.(10 + N), inside the cluster only
mtu=${HPCINFER_CLUSTER_MTU:-9000}
shm=${HPCINFER_CLUSTER_SHM:-1g}                            # of each host's /dev/shm at most
spaces=(--net --uts --ipc --mount)
fail() { echo "launch/virtual_cluster.sh: $1" >&2; exit 1; }
started() { local stat; read -r -a stat 2>/dev/null <"/proc/$1/stat" && echo "${stat[21]}"; }  # tells apart who had a pid
pid_of() { (read -r pid start <"$dir/$1.pid" && [ "$(started "$pid")" = "$start" ] && echo "$pid") 2>/dev/null || fail "no $1 in $dir"; }
enter() { local pid; pid=$(pid_of "$1"); exec nsenter --target "$pid" "${spaces[@]}" --wd="$PWD" -- "${@:2}"; }
start() {  # NAME COMMAND...: in the background; returns when it has said that it is ready
    read -r _ < <(pid=$BASHPID; echo "$pid $(started "$pid")" >"$dir/$1.pid"; exec setsid "${@:2}" </dev/null 2>>"$dir/log") \
        || fail "$1 does not start: $(tail -n 1 "$dir/log")"
}
boot() {  # the first process of a host
    hostname "$1"; mount -t tmpfs -o "size=$shm" tmpfs /dev/shm; mount --bind "$dir/hosts" /etc/hosts; ip link set lo up
    echo ready; exec sleep infinity
}
crash() {  # kill all processes of a host but the first, until there are no others
    local first pids
    first=$(pid_of "$1")
    while pids=$({ find -L /proc/[0-9]*/ns/net -samefile "/proc/$first/ns/net" || true; } 2>/dev/null | cut -d/ -f3 | grep -vx "$first"); do
        xargs kill -9 <<<"$pids" 2>/dev/null || true
    done
}
up() {
    local i names=() tool reason
    for tool in ip nsenter unshare cc; do command -v "$tool" >/dev/null || fail "no $tool here"; done
    reason=$(unshare "${spaces[@]}" --pid --fork --mount-proc true 2>&1) || fail "no namespaces for us: $reason"
    [ -w /dev/net/tun ] || fail "no /dev/net/tun for us"
    mkdir "$dir" || fail "one cluster at a time: launch/virtual_cluster.sh down"
    cc -O2 -o "$dir/vswitch" "$here/vswitch.c"; mkfifo "$dir/control"; echo "127.0.0.1 localhost" >"$dir/hosts"
    for ((i = 0; i < $1; i++)); do names+=("vh$i"); echo "$net.$((10 + i)) vh$i" >>"$dir/hosts"; done
    start switch unshare --net "$dir/vswitch" "$dir/control" "${names[@]}"
    for i in "${!names[@]}"; do
        start "vh$i" unshare "${spaces[@]}" "$here/virtual_cluster.sh" boot "vh$i"
        nsenter --target "$(pid_of switch)" --net ip link set "vh$i" netns "$(pid_of "vh$i")"
        (enter "vh$i" bash -ec "ip link set vh$i name eth0 mtu $mtu up; ip addr add $net.$((10 + i))/24 dev eth0")
    done
}
down() { for file in "$dir"/*.pid; do host=$(basename "$file" .pid); (crash "$host"; kill -9 "$(pid_of "$host")") || true; done; rm -rf "$dir"; }
case ${1:-} in
    up) up "${2:-4}"; echo link "${3:-100}" "${4:-1000}" >"$dir/control" ;;
    exec) enter "${@:2}" ;;
    agent) TMPDIR=$(mktemp -d "$dir/tmp.XXXXXX") enter "$2" unshare --pid --fork --mount-proc --kill-child bash -c "${*:3}" ;;
    hostfile) while read -r _ host; do [ "$host" = localhost ] || echo "$host slots=${2:-2}"; done <"$dir/hosts" ;;
    cut | heal | link) echo "$@" >"$dir/control" ;;
    boot) boot "$2" ;;
    kill) crash "$2" ;;
    down) down ;;
    *) sed -n '2,7s/^# *//p' "$0" >&2; exit 2 ;;
esac
