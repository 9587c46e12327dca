"""What a training needs beside its experts: metrics, guard, saving, and checkpoints that resume.

For plugin."""
