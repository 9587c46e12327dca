"""Model families: routed experts are found by structure; what differs is a row of a table.

For checkpoint and everything above it.
"""
