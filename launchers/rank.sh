#!/bin/bash
# What every srun task runs: bash launchers/rank.sh MODULE ARGUMENT...
# A task is a rank (LAUNCH=srun), or a node whose ranks torchrun or deepspeed start.

# USR1 tells ranks to commit and stop. SLURM sends it to every process of the step; the trainer handles it, and all others
# (this shell, torchrun, deepspeed, wandb), which would die of it, inherit that it is ignored.
trap '' USR1
trap : TERM  # this shell outlives its rank, to say how it ended

LOGS=${LOGS:-logs}
if [ "$SLURM_PROCID" != 0 ]; then
  exec >>"$(printf '%s/output-%05d.log' "$LOGS" "$SLURM_PROCID")" 2>&1  # rank 0 alone prints to the job's log
fi

case ${LAUNCH:-srun} in
  srun)
    start=(python -m) ;;
  torchrun)
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}  # 30 s is too short to commit in
    start=(python -m torch.distributed.run --nnodes="$SLURM_STEP_NUM_NODES" --node-rank="$SLURM_NODEID"
      --nproc-per-node="$RANKS_PER_NODE" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"
      --log-dir="$LOGS/torchrun" --redirects=3 --tee=0:3 -m) ;;
  deepspeed)
    hostfile=$LOGS/hostfile.$SLURM_JOB_ID.$SLURM_NODEID
    printf "%s slots=$RANKS_PER_NODE\n" $HOSTS >"$hostfile"
    start=(deepspeed --hostfile "$hostfile" --no_ssh --no_local_rank --node_rank "$SLURM_NODEID"
      --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --module) ;;
  *)
    echo "LAUNCH=$LAUNCH does not exist: choose srun, torchrun or deepspeed" >&2
    exit 2 ;;
esac

"${start[@]}" "$@"
code=$?
# 75: committed and stopped as asked. For srun that is no failure: it would kill the ranks that are not out yet.
[ $code = 75 ] && code=0
exit $code
