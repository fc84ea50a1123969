"""Text, images, splits and what a task asks of a head."""
