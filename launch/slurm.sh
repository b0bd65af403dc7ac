#!/usr/bin/env bash
# Trains on the nodes of a Slurm job with one process per GPU:
#
#   sbatch launch/slurm.sh --conf configs/pythia/1-4B.yml my-data.yml --set run.dir=/shared/runs/first
#   sbatch --nodes 4 --gpus-per-node 4 launch/slurm.sh --conf mine.yml
#
# Edit the paths below, and account, partition and time limit for your cluster, or pass them to sbatch as above.
# Submit it in the folder of the checkout.
#
# Two minutes before the time limit Slurm sends SIGUSR1 to the processes. The run saves a checkpoint and exits with code
# 10, and this job is requeued and resumes from the newest checkpoint. After a node failure Slurm requeues it itself.
#SBATCH --job-name=neox
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

NEOX=${NEOX:-${SLURM_SUBMIT_DIR:?start this by sbatch}} # this checkout, on a file system that every node can access
VENV=${VENV:-$NEOX/.venv}       # created by `make setup`
IMAGE=${IMAGE:-}                # alternative to VENV: an image of the Dockerfile, if srun has --container-image

STOPPED_AFTER_SAVING=10

cd "$NEOX"
gpus=${SLURM_GPUS_ON_NODE:?start this by sbatch}
cpus=$((${SLURM_CPUS_ON_NODE:-$gpus} / gpus))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > 0 ? cpus : 1))}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} # jobs may share a node

run=(srun --ntasks-per-node "$gpus" --cpus-per-task "$OMP_NUM_THREADS" --kill-on-bad-exit=0)
if [[ -n $IMAGE ]]; then
    run+=(--container-image "$IMAGE" --container-mounts "$NEOX:$NEOX" --container-workdir "$NEOX" python)
else
    run+=("$VENV/bin/python")
fi

# Each process takes rank, size and the first node from the variables of srun, and the GPU of its local rank.
code=0
"${run[@]}" train.py "$@" || code=$?
if ((code == STOPPED_AFTER_SAVING)); then
    scontrol requeue "$SLURM_JOB_ID"
    code=0
fi
exit "$code"
