"""Text generation from a trained model: loading a checkpoint for inference, the decoding loop, sampling, dialogues."""
