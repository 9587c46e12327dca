"""What computes the experts of a layer: one seam, and the engines behind it.

For experts and everything above it.
"""
