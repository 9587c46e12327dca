"""Measurements: the machine's peak, a layer beside its peers, formats on text. For cli."""
