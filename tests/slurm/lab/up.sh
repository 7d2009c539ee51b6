#!/bin/bash
# A real SLURM cluster on one Debian machine, from nothing; for root, without systemd and cgroups. Idempotent: what has died
# is started again. Every node has a network and UTS namespace of its own, so it has its own address and hostname and can
# be cut off; all share the machine's disk.
#   LAB=folder  NODES=4  CPUS=8 (declared per node)  GPUS=2 (make-believe: devices that swallow what is written to them)
set -euo pipefail
LAB=${LAB:-${TMPDIR:-/tmp}/slurm-lab} NODES=${NODES:-4} CPUS=${CPUS:-8} GPUS=${GPUS:-2}
NET=10.77.0 BRIDGE=slbr0 LOGIN=$(hostname -s)
export SLURM_CONF=$LAB/slurm.conf

# A killed daemon may stay a zombie where process 1 is slow to reap: kill -0 alone would call it alive.
alive() { [ -s "$1" ] && case $(sed 's/.*) \(.\).*/\1/' "/proc/$(cat "$1")/stat" 2>/dev/null) in ''|Z|X) false;; esac; }

# 1. packages: 3.5 MB
mkdir -p "$LAB"/{state,spool,log,run,munge,gpu}
missing=()
for package in slurmctld slurmd slurm-client munge iproute2; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  apt-get update -qq >"$LAB/log/apt.log" 2>&1
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" >>"$LAB/log/apt.log" 2>&1
fi

# 2. munge with its own key and socket, nothing under /run or /etc
chmod 755 "$LAB" "$LAB/run"; chmod 711 "$LAB/munge"
if [ ! -s "$LAB/munge/key" ]; then
  dd if=/dev/urandom of="$LAB/munge/key" bs=128 count=1 status=none; chmod 400 "$LAB/munge/key"
fi
if ! alive "$LAB/munge/pid"; then
  rm -f "$LAB/munge/"{sock,sock.lock,pid}
  /usr/sbin/munged --key-file="$LAB/munge/key" --socket="$LAB/munge/sock" --pid-file="$LAB/munge/pid" \
    --log-file="$LAB/munge/log" --seed-file="$LAB/munge/seed" --num-threads=4 --force
fi
for _ in $(seq 50); do munge -S "$LAB/munge/sock" -n >/dev/null 2>&1 && break; sleep 0.1; done

# 3. network: a bridge on this machine, a namespace and a cable (vh-nodeN) per node
ip link show $BRIDGE >/dev/null 2>&1 || ip link add $BRIDGE type bridge
ip addr replace $NET.254/24 dev $BRIDGE; ip link set $BRIDGE up
hosts="127.0.0.1 localhost"$'\n'"$NET.254 $LOGIN login"$'\n'
for i in $(seq "$NODES"); do hosts+="$NET.$i node$i"$'\n'"::ffff:$NET.$i node$i"$'\n'; done
for i in $(seq "$NODES"); do
  node=node$i
  # As Debian has it, a node's own name stands for its loopback, where no other node reaches it.
  mkdir -p /etc/netns/$node; sed "s/^.* node$i$/127.0.1.1 node$i/" <<<"$hosts" | uniq >/etc/netns/$node/hosts
  [ -e /run/netns/$node ] || ip netns add $node
  if ! ip link show vh-$node >/dev/null 2>&1; then
    ip link add vh-$node type veth peer name eth0 netns $node
    ip link set vh-$node master $BRIDGE
    ip -n $node addr add $NET.$i/24 dev eth0
  fi
  # And as on many clusters, every node has a network that leads nowhere, before the one that does.
  ip -n $node link show docker0 >/dev/null 2>&1 || ip -n $node link add docker0 type veth peer name docker1
  ip -n $node addr replace 172.17.0.1/16 dev docker0; ip -n $node link set docker0 up; ip -n $node link set docker1 up
  ip link set vh-$node up; ip -n $node link set lo up; ip -n $node link set eth0 up
done

# 4. slurm.conf
for g in $(seq 0 $((GPUS - 1))); do
  [ -c "$LAB/gpu/nvidia$g" ] || mknod "$LAB/gpu/nvidia$g" c 1 3
done
echo "NodeName=node[1-$NODES] Name=gpu File=$LAB/gpu/nvidia[0-$((GPUS - 1))]" >"$LAB/gres.conf"
echo "CgroupPlugin=cgroup/v1" >"$LAB/cgroup.conf"  # autodetection dies in a namespace; v1 named outright asks for nothing
{
cat <<CONF
ClusterName=lab
SlurmctldHost=$LOGIN($NET.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a job that was put back waits as long as its credential lives: 5 s in place of 120
AuthInfo=socket=$LAB/munge/sock,cred_expire=5
CredType=cred/munge
SlurmctldPort=16817
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd-%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
# more CPUs may be declared than there are
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
# quick where a site is patient
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=3
MessageTimeout=5
TCPTimeout=2
MinJobAge=3600
UnkillableStepTimeout=20
JobRequeue=1
# jobs of the partition urgent take the nodes of main, whose jobs get TERM and a minute
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# a node that was lost comes back by itself, one that was set down stays down
ReturnToService=1
DebugFlags=NO_CONF_HASH
CONF
for i in $(seq "$NODES"); do
  echo "NodeName=node$i NodeAddr=$NET.$i Port=16818 CPUs=$CPUS RealMemory=4000 Gres=gpu:$GPUS State=UNKNOWN"
done
echo "PartitionName=main Nodes=node[1-$NODES] Default=YES MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=1 GraceTime=60"
echo "PartitionName=urgent Nodes=node[1-$NODES] MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=2"
} >"$SLURM_CONF"

# 5. daemons
alive "$LAB/run/slurmctld.pid" || slurmctld -f "$SLURM_CONF"
for i in $(seq "$NODES"); do
  node=node$i
  alive "$LAB/run/slurmd-$node.pid" && continue
  mkdir -p "$LAB/spool/$node"
  ip netns exec $node unshare --uts bash -c "hostname $node; exec slurmd -N $node -f $SLURM_CONF"
done
up() { sinfo -h -t idle,alloc,mix -o %D 2>/dev/null | awk '{ sum += $1 } END { print sum + 0 }'; }
for _ in $(seq 100); do [ "$(up)" = "$NODES" ] && break; sleep 0.1; done
[ "$(up)" = "$NODES" ] || { sinfo -N >&2; echo "not all nodes are up; see $LAB/log" >&2; exit 1; }
echo "cluster up: export SLURM_CONF=$SLURM_CONF"
