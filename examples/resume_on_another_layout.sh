#!/usr/bin/env bash
# Train under one layout and resume under two others: tensor parallelism, ZeRO over data parallelism, one process.
# The checkpoints need no conversion, and metrics.jsonl continues without a gap.
#
#   examples/resume_on_another_layout.sh runs/own/config.yml runs/moved
#
# Environment: STEPS (20), the steps of each of the three parts.
set -euo pipefail
config=${1:?usage: examples/resume_on_another_layout.sh CONFIG [OUT]} out=${2:-runs/moved}
steps=${STEPS:-20}
train_py=$(dirname "$0")/../train.py

# part N trains to step N * STEPS; the global batch and the schedule stay, so that only the layout differs
part() {
    local last=$(($1 * steps)) processes=$2; shift 2
    torchrun --standalone --nproc-per-node "$processes" "$train_py" --conf "$config" \
        --set run.dir="$out" train.train_iters="$last" train.global_batch_size=8 train.micro_batch_size=4 \
        schedule.decay_iters=$((3 * steps)) schedule.warmup_iters=2 checkpoint.save_interval="$steps" evaluate.interval=0 "$@"
}
part 1 2 parallel.tensor=2 parallel.sequence=true
part 2 2 zero.stage=2
part 3 1

neox checkpoint verify "$out"
python - "$out/metrics.jsonl" <<'PY'
import json, sys

for line in open(sys.argv[1]):
    step = json.loads(line)
    print(f"step {step['step']:3}  loss {step['loss']:.4f}")
PY
