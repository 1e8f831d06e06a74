#!/bin/bash
# Trains on 4 nodes of 8 GPUs each, one process a GPU: `sbatch examples/slurm.sh`.
#
# SLURM tells the processes where the others are, so `--coordinator` is not given. Before
# the time is over it sends them SIGTERM: all save the same step and exit with 0. The
# next `sbatch` of this script, or SLURM itself after a preemption, goes on from there.
#SBATCH --job-name=nanochat
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x.log

set -euo pipefail

# On a file system that all nodes have, so that all read and write the same folder.
RUN=${RUN:-runs/nano_125m}

WHERE=(--checkpoint-dir "$RUN")
# Of a run that has saved a step there is a folder with its number.
if compgen -G "$RUN/[0-9]*" > /dev/null; then
  WHERE=(--resume "$RUN")
fi

# The product of the mesh is the number of all GPUs, 4 x 8. `data` are the nodes, so that
# parameters are gathered within one. A microbatch has a sequence for each of them.
srun nanochat-jax train \
  --config-file configs/nano_125m_8bit.toml \
  --mesh data=4,fsdp=8 \
  --batch-size 32 \
  --grad-accum-steps 1 \
  --device gpu \
  "${WHERE[@]}"
