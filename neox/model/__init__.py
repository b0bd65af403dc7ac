"""The architecture: one GPT whose layers are plain modules."""
