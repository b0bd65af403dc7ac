"""The command line: one file per command, the only readers of argv and the environment."""
