"""From indexed datasets to training samples: order, blending, packing, loading, and the way back from a sample to its documents."""
