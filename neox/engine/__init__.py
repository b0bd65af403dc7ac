"""The training engine: one optimizer step on DeepSpeed's data-parallel machinery. The only importer of deepspeed."""
