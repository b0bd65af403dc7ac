#!/usr/bin/env bash
# Fine-tune a trained model on conversations, with low-rank adapters.
#
#   examples/fine_tune.sh runs/own/run chats.jsonl runs/tuned
#
# A line of chats.jsonl: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
# Environment: STEPS (100).
set -euo pipefail
base=${1:?usage: examples/fine_tune.sh BASE CHATS [OUT]} chats=${2:?usage: examples/fine_tune.sh BASE CHATS [OUT]} out=${3:-runs/tuned}
steps=${STEPS:-100}
train_py=$(dirname "$0")/../train.py
tokenizer=$(neox config show "$base/config.lock.yml" --json | python -c 'import json, sys; print(json.load(sys.stdin)["config"]["tokenizer"]["file"])')
mkdir -p "$out"

neox preprocess --chat --chat-template plain --input "$chats" --tokenizer "$tokenizer" --out "$out/chat"

cat > "$out/sft.yml" <<YAML
model: {lora: {rank: 8, alpha: 16.0}}
data: {path: null, train: [{path: "$out/chat", labels: "$out/chat_labels"}], packing: document}
optimizer: {lr: 1.0e-3}
schedule: {warmup_iters: 0, decay_iters: $steps}
train: {objective: sft, train_iters: $steps, micro_batch_size: 4, global_batch_size: null}
checkpoint: {init_from: "$base", save_interval: $steps}
evaluate: {interval: 0}
run: {dir: "$out/run"}
YAML

python "$train_py" --conf "$base/config.lock.yml" "$out/sft.yml"
neox generate --checkpoint "$out/run" --prompt "Hello" --max-new-tokens 20 --temperature 0
