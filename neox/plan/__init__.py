"""What a run will need, said before it starts: memory, communication, time (docs/plan.md). Nothing here imports torch."""
