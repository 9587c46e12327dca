"""Adapters in every layout: read, written for other programs, merged. For loading, plugin, cli."""
