"""Programs that show the loss at work."""
