"""What a run was, kept beside its adapter and drawn as one page. For people to show to others."""
