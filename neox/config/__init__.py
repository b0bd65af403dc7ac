"""The config of a run: schema, loading with origins, validation, explanation. Imports no torch."""
