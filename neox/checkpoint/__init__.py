"""Crash-safe checkpoints: logical tensors in safetensors shards, and a manifest that is published last.

docs/checkpoints.md describes the format.

Start at `neox.checkpoint.reader` (Checkpoint), `neox.checkpoint.find` (find) and `neox.checkpoint.save` (save).
"""
