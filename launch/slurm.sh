#!/usr/bin/env bash
# Trains over the nodes of a Slurm job, one process per GPU:
#
#   sbatch launch/slurm.sh --conf configs/pythia/1-4B.yml my-data.yml --set run.dir=/shared/runs/first
#   sbatch --nodes 4 --gpus-per-node 4 launch/slurm.sh --conf mine.yml
#
# To edit: the paths below, and account, partition and time of your cluster (or give them to sbatch, as above). Start it in the checkout.
#
# Two minutes before the time limit Slurm sends SIGUSR1 to the processes: the run saves and ends with code 10, and this job goes back into the queue, to
# resume from the newest checkpoint. After a node failure Slurm requeues it by itself.
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

NEOX=${NEOX:-${SLURM_SUBMIT_DIR:?start this by sbatch}} # this checkout, on a file system that every node sees
VENV=${VENV:-$NEOX/.venv}       # what `make setup` made there
IMAGE=${IMAGE:-}                # instead of VENV: an image made from the Dockerfile, on a cluster whose srun has --container-image

STOPPED_AFTER_SAVING=10

cd "$NEOX"
gpus=${SLURM_GPUS_ON_NODE:?start this by sbatch}
cpus=$((${SLURM_CPUS_ON_NODE:-$gpus} / gpus))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > 0 ? cpus : 1))}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} # two jobs may share a node

run=(srun --ntasks-per-node "$gpus" --cpus-per-task "$OMP_NUM_THREADS" --kill-on-bad-exit=0)
if [[ -n $IMAGE ]]; then
    run+=(--container-image "$IMAGE" --container-mounts "$NEOX:$NEOX" --container-workdir "$NEOX" python)
else
    run+=("$VENV/bin/python")
fi

# The processes take rank, size and the first node from srun's own variables; each takes the GPU of its number on the node.
code=0
"${run[@]}" train.py "$@" || code=$?
if ((code == STOPPED_AFTER_SAVING)); then
    scontrol requeue "$SLURM_JOB_ID"
    code=0
fi
exit "$code"
