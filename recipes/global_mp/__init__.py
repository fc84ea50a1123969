"""Global magnitude pruning: one threshold for all weights of a model."""
