"""From indexed datasets to training samples: order, blending, packing, loading, and provenance."""
