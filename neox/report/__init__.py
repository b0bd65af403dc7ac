"""Report pages about runs, readable without network or server."""
