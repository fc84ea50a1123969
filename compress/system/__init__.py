"""What a disk and an operating system do differently from one machine to the next."""
