#!/usr/bin/env bash
# Prunes a model on several nodes under Slurm: one launcher a node, one process a GPU.
#
#     sbatch --nodes=2 --gpus-per-node=8 tools/slurm.sh llama-70b --recipe tyr-large --out /shared/runs/llama-70b
#
# The run folder (--out) and the caches of the hub must be on a file system that all nodes share. When the job dies or its
# time runs out, submit the same line again: it goes on behind the last sealed block, with any number of nodes.
#SBATCH --job-name=compress
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
set -euo pipefail

MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))
GPUS=${SLURM_GPUS_ON_NODE:-8}

# SLURM_NODEID is each node's own: it must be expanded there, not here.
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch \
        --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
        --num_processes "$(( SLURM_NNODES * '"$GPUS"' ))" \
        --main_process_ip '"$MAIN"' --main_process_port '"$PORT"' \
        --mixed_precision no --dynamo_backend no \
        -m compress prune "$@"
' compress "$@"
