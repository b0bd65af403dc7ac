"""From text to indexed datasets: reading, tokenizing, encoding, `neox preprocess`."""
