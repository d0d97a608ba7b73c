#!/bin/bash
# Purpose:   one run on several machines of a SLURM cluster: weights, gradients and states are cut over all their GPUs.
# Launch:    sbatch recipes/cluster/slurm.sh --config recipes/configs/llama3.1-8b/full.yaml --train_file train.jsonl
# Override:  sbatch --nodes 4 --gpus-per-node 4 --time 2:00:00 recipes/cluster/slurm.sh ...; another script or
#            file by SCRIPT=recipes/no_trainer.py LAUNCH_FILE=recipes/accelerate/hsdp.yaml before sbatch
# Hardware:  two machines with 8 GPUs each, and a disk that all of them see, with this folder and its .venv on it.
#            Tested without a cluster: what each machine would start is read by accelerate's own parser.
#SBATCH --job-name=hf-tam
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
set -euo pipefail

export LAUNCH_FILE=${LAUNCH_FILE:-recipes/accelerate/fsdp2.yaml} SCRIPT=${SCRIPT:-recipes/sft.py}
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER PATH=$PWD/.venv/bin:$PATH

# One launcher a machine; a job that was requeued goes on from its newest checkpoint.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$LAUNCH_FILE" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER" --main_process_port 29500 \
    "$SCRIPT" "$@" --resume_from_checkpoint auto' launcher "$@"
