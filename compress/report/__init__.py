"""The report, and everything that is drawn or written from it."""
