"""The training engine: DeepSpeed's data-parallel machinery behind one small class. The only importer of deepspeed."""
