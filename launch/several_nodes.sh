#!/bin/sh
# Trains on several machines with a shared file system. Start the same command on each of them at about the same time.
#
#   NODES=4 HEAD=node0.cluster:29500 launch/several_nodes.sh ponderlm2 --data.text books/ --out /shared/runs/books
#
# Under Slurm: sbatch --nodes 4 --ntasks-per-node 1 --gpus-per-node 8 --wrap 'NODES=$SLURM_NNODES
#   HEAD=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1):29500 srun launch/several_nodes.sh ponderlm2 ...'
# After SIGTERM (preemption) training finishes the step and saves; the same command with --resume continues it.
: "${NODES:?number of machines, e.g. NODES=4}" "${HEAD:?address of the first machine, e.g. HEAD=node0:29500}"
exec torchrun --nnodes "$NODES" --nproc-per-node "${GPUS:-gpu}" --rdzv-backend c10d --rdzv-endpoint "$HEAD" \
  --rdzv-id "${SLURM_JOB_ID:-pondera}" -m pondera train "$@" --train.dtype bfloat16
