"""Text generation from a trained model: sampling, key-value cache, decoding loop, loading a checkpoint for inference."""
