"""What leaves here: an adapter merged into the original checkpoint. For plugin."""
