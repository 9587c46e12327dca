"""Memory, counted before anything is read. For loading and plugin."""
