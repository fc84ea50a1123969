"""Language models: set-up, checkpoints, budget, plan, evaluation, recovery, activations."""
