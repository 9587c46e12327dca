"""What a recipe will take on a machine: memory, time, what limits it, what would fit better.

From the configuration alone, before anything is read. For the command line and for reports.
"""
