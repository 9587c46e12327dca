"""Other people's files, read only: which tensor is which, its coding, whether to believe it.

For planning, loading and export.
"""
