#!/usr/bin/env bash
# Train a small model on your own text: tokenizer, dataset, training, evaluation, generation.
# About ten minutes on two cores with the default number of steps.
#
#   examples/own_data.sh my_texts/ runs/own
#
# Environment: STEPS (300), VOCAB (4096), CONTEXT (256 tokens).
set -euo pipefail
texts=${1:?usage: examples/own_data.sh TEXTS [OUT]} out=${2:-runs/own}
steps=${STEPS:-300} vocab=${VOCAB:-4096} context=${CONTEXT:-256}
train_py=$(dirname "$0")/../train.py
mkdir -p "$out"

neox tokenizer train --input "$texts" --vocab-size "$vocab" --out "$out/tokenizer.json"
neox preprocess --input "$texts" --tokenizer "$out/tokenizer.json" --out "$out/data"
neox data inspect "$out/data"

cat > "$out/config.yml" <<YAML
model: {num_layers: 4, hidden_size: 256, num_attention_heads: 4, max_position_embeddings: $context, rotary_pct: 0.25, parallel_residual: true}
tokenizer: {file: "$out/tokenizer.json"}
data: {path: "$out/data", split: "90,10,0", seq_length: $context}
optimizer: {lr: 2.0e-3, weight_decay: 0.1}
schedule: {type: cosine, warmup_iters: $((steps / 10)), min_lr: 2.0e-4}
precision: {dtype: fp32}
train: {train_iters: $steps, micro_batch_size: 8}
checkpoint: {save_interval: $((steps / 2)), keep: 2}
evaluate: {interval: $((steps / 2)), iters: 4}
run: {dir: "$out/run"}
YAML

neox plan "$out/config.yml" --world-size 1
python "$train_py" --conf "$out/config.yml"
neox evaluate --checkpoint "$out/run" --data "$out/data" --max-documents 4
neox generate --checkpoint "$out/run" --prompt "The " --max-new-tokens 40 --temperature 0.8
