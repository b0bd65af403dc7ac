"""The target that has no loss. torch uses the same number."""

IGNORED = -100
