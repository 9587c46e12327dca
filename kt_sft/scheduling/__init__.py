"""Which experts of a layer are computed where: on the host, or on an accelerator.

For the engines that part a layer, and for whoever plans or explains what they do. Numbers only:
what a place takes is measured elsewhere.
"""
