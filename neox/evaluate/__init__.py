"""Evaluation of a trained model: perplexity of a dataset, log-likelihoods, tasks of lm-evaluation-harness."""
