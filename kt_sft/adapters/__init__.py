"""Expert LoRA as PEFT drives it: the layer, its names and its state dict.

For experts and everything above it.
"""
