"""Crash-safe checkpoints: logical tensors in safetensors shards, and a manifest that is renamed to its final name last (docs/checkpoints.md).

Start at `neox.checkpoint.reader` (Checkpoint), `neox.checkpoint.find` (find) and `neox.checkpoint.save` (save).
"""
