"""Ranks, exact sums, training over processes, and how children are started."""
