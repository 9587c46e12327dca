"""Files that survive: what is on the disk before it gets its name. For every room that writes."""
