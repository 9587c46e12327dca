"""Our own file: the packed experts of a model, written once and mapped. For loading and cli."""
