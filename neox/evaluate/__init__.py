"""Evaluation of a trained model on text."""
