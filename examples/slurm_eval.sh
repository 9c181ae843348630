#!/usr/bin/env bash
# Two nodes of eight GPUs: sbatch examples/slurm_eval.sh MODEL DATASET OUTPUT
# A job that is preempted or runs out of time is queued again and goes on from its journal. OUTPUT is on a file system
# that both nodes see.
#SBATCH --job-name=hf-posext
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

set -euo pipefail
model=${1:?MODEL} dataset=${2:?DATASET} output=${3:?OUTPUT}

# Two minutes before the time is over: back into the queue. Nothing need be saved, the journal is on the disk.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

main_ip=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MODEL=$model DATASET=$dataset OUTPUT=$output MAIN_IP=$main_ip

# SLURM_NODEID is known on each node only, so the inner shell expands it. Since Slurm 22.05 srun does not take
# --cpus-per-task from the job.
# shellcheck disable=SC2016
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c 'accelerate launch \
    --config_file examples/accelerate_configs/two_nodes.yaml \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_IP" --main_process_port 29500 \
    -m hf_posext evaluate --model "$MODEL" --dataset "$DATASET" --output "$OUTPUT" \
    --dtype bfloat16 --lengths 4096,32768,131072 --resume' &
wait $!
