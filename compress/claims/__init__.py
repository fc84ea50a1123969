"""A claim and how it is checked; measuring again; fetching the dense model."""
