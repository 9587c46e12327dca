"""LoRA on routed experts: the layers that PEFT drives, and the form that other programs read."""
