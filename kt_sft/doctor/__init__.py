"""What this machine and this installation can do, tried out. For the command line and bug reports.

Every module yields findings of one kind; none of them changes anything.
"""
