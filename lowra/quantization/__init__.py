"""How a weight becomes bits: learner, assigner, packing, an adapter's low-rank start, and the stream of a model."""
