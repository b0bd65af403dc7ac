"""Checkpoints that cannot be lost: logical tensors in safetensors shards, a manifest renamed into place last (docs/checkpoints.md).

Start at `neox.checkpoint.load` (find, Checkpoint, verify, digest) and `neox.checkpoint.save` (save).
"""
