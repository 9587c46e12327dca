"""The arithmetic of packed experts in torch's operations, on whatever device their bytes are.

For the engines that give an accelerator a share of the experts. The compiled core has the same
arithmetic for the host; both compute with the same weights and drop the same of LoRA's inputs.

Legend: T tokens, D hidden size, F intermediate size, E experts, n experts of a piece, K top-k, R
routed rows, M rows of a piece, r LoRA rank.
"""
