"""Fault injection for tests: an observer of a run's phases, and storage whose calls fail.

Importing this package does not import torch.
"""
