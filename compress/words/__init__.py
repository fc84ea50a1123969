"""Text that is shown: escaping, plurals, numbers."""
