"""compress: prune a trained model, export it, measure it, and prove what was won and lost."""

__version__ = "0.2.0"
