"""The page of a run: what happened, readable without network or server."""
