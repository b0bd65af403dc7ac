"""Process management: launch information, rendezvous, process group, watchdog, signals.

Importing this package does not import torch.
"""
