"""What each verb does, as functions that take paths and return facts."""
