#!/bin/bash
# Stops what up.sh started, each process by its own pid file. Idempotent. CLEAN=1 also removes state and logs.
set -uo pipefail
LAB=${LAB:-${TMPDIR:-/tmp}/slurm-lab} BRIDGE=slbr0
export SLURM_CONF=$LAB/slurm.conf

gone() { case $(sed 's/.*) \(.\).*/\1/' "/proc/$1/stat" 2>/dev/null) in ''|Z|X) ;; *) false;; esac; }
stop() { # pid file, expected name
  [ -s "$1" ] || return 0
  local pid; pid=$(cat "$1")
  if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ]; then
    kill "$pid"; for _ in $(seq 50); do gone "$pid" && break; sleep 0.1; done
    gone "$pid" || kill -9 "$pid"
  fi
  rm -f "$1"
}

# jobs first, so that no step is left over
pid=$(cat "$LAB/run/slurmctld.pid" 2>/dev/null) && if ! gone "$pid"; then
  squeue -h -o %A 2>/dev/null | sort -un | xargs -r scancel
  for _ in $(seq 100); do [ -z "$(squeue -h -t R,CG 2>/dev/null)" ] && break; sleep 0.1; done
fi
for file in "$LAB"/run/slurmd-*.pid; do [ -e "$file" ] && stop "$file" slurmd; done
stop "$LAB/run/slurmctld.pid" slurmctld
stop "$LAB/munge/pid" munged
for node in $(ls /etc/netns 2>/dev/null | grep -E '^node[0-9]+$'); do
  ip netns pids "$node" 2>/dev/null | xargs -r kill -9 2>/dev/null  # steps that outlived their slurmd
  ip link del "vh-$node" 2>/dev/null; ip netns del "$node" 2>/dev/null; rm -rf "/etc/netns/$node"
done
ip link del $BRIDGE 2>/dev/null
[ "${CLEAN:-0}" = 1 ] && rm -rf "$LAB"
echo down
