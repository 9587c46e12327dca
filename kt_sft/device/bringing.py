"""Small tensors of the host on their way to a device, without anybody waiting."""

from __future__ import annotations

from torch import Tensor, device


def bring(tensor: Tensor, to: device) -> Tensor:
    """`tensor`, which is on the host or there already, on a device.

    From pageable memory the copy may wait for all that the device was given before; torch keeps
    pinned memory until its copy is over.
    """
    if tensor.device == to:
        return tensor
    if tensor.device.type == "cpu" and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(to, non_blocking=True)
