"""Indexed datasets on disk: the `.bin/.idx` files, their sidecar, and statistics of what they hold."""
