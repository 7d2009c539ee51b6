# Sourced by the *.sbatch files on the first node: what all ranks inherit, and how srun starts them.
# Every value can be set before, by the site (configs/cluster/*.yaml: environment) or by the user.

# --- how ranks find each other ---
LAUNCH=${LAUNCH:-srun}                                # srun: a task per rank; torchrun, deepspeed: a task per node
RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")   # here, for a container has no scontrol to ask
MASTER_ADDR=${HOSTS%%$'\n'*}                          # rank 0 is on the first node
MASTER_PORT=$((20000 + SLURM_JOB_ID % 40000))         # jobs that share a node differ in it
export LAUNCH RANKS_PER_NODE HOSTS MASTER_ADDR MASTER_PORT

# --- threads ---
# srun does not inherit --cpus-per-task of sbatch since SLURM 22.05, and since 23.11 it ends where two of these variables
# differ. All say what a task of the step gets: the CPUs of a rank, or of all ranks that one task starts.
SRUN_CPUS_PER_TASK=${CPUS_PER_RANK:-${SLURM_CPUS_PER_TASK:-1}}
[ "$LAUNCH" = srun ] || SRUN_CPUS_PER_TASK=$((SRUN_CPUS_PER_TASK * RANKS_PER_NODE))
export SRUN_CPUS_PER_TASK SLURM_CPUS_PER_TASK=$SRUN_CPUS_PER_TASK
if [ -n "${SLURM_TRES_PER_TASK-}" ]; then
  SLURM_TRES_PER_TASK=$(sed -E "s/(^|,)cpu[=:][^,]*/\\1cpu=$SRUN_CPUS_PER_TASK/" <<<"$SLURM_TRES_PER_TASK")
  export SLURM_TRES_PER_TASK
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}          # the default, all cores for every rank, makes ranks fight
export PYTHONUNBUFFERED=1                             # what a rank printed before it died is in the log
if [ -z "${IMM_CODE-}" ]; then
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}   # the checkout's code, whichever one is installed
else
  export PYTHONSAFEPATH=1                             # the installed code, whatever lies in this folder
fi

# --- NCCL and gloo ---
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                 # its errors name the host and the link
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}   # a failed collective ends the process
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}         # 17 s per retry: a rerouting fabric is no failure
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}             # which collective hung, on which rank
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}                      # what the dump is made of

# Not set here, but by each rank for itself where neither the site nor the user has set it:
# GLOO_SOCKET_IFNAME                imm_scale/parallel/network.py: the interface may have another name on another node, and rank.sh
#                                   may run in a container that has no `ip` to ask
# TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC  imm_scale/parallel/world.py: it follows from train.step_timeout

# --- the step: a command in front of which nothing else is needed ---
# --kill-on-bad-exit  a dead rank ends the step at once, instead of leaving its peers in a collective
# --wait              so does a rank that is still there when its peers have gone
# --mpi=none          nothing here speaks MPI; a site's default may wait for one
STEP=(srun --nodes="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 --wait=300 --mpi=none --unbuffered)
if [ "$LAUNCH" = srun ]; then
  STEP+=(--ntasks="$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))" --ntasks-per-node="$RANKS_PER_NODE")
else
  STEP+=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
fi
STEP+=(${SRUN_OPTIONS+"${SRUN_OPTIONS[@]}"} ${WRAP+"${WRAP[@]}"})
