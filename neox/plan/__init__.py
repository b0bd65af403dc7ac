"""Prediction of what a run needs: memory, communication, time (docs/plan.md). Nothing here imports torch."""
