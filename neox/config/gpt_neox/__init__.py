"""GPT-NeoX configs: what every key means here, and how a set of files becomes a native config."""
