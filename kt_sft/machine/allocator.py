"""The C library's allocator in a training without an accelerator, where activations are its blocks.

glibc starts with handing blocks of 128 KB and more back to the system when they are freed, and
stops as they grow: up to 32 MB it then keeps them in its heap, whose holes are lost to larger
ones. A training holds up to twice what it has in use so; with the first threshold kept, a step of
small layers takes up to 1.4 times as long (docs/measurements.md), as every block is new memory.
"""

from __future__ import annotations

import ctypes
import logging
import os

logger = logging.getLogger(__name__)

# Of malloc.h; the values are those that glibc starts with.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_THRESHOLD_BYTES = 128 << 10
# What is held of the parts that torch allocates, at most, over what is in use.
_HELD = 2.2
# By these a person has decided.
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def return_freed_blocks() -> bool:
    """Lets glibc hand freed blocks back from now on; False where it is not asked."""
    if any(name in os.environ for name in _VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((_M_MMAP_THRESHOLD, _THRESHOLD_BYTES), (_M_TRIM_THRESHOLD, 2 * _THRESHOLD_BYTES))
    return all([bool(mallopt(name, value)) for name, value in settings])


def settle(planned: int, free: int) -> None:
    """Chooses between time and memory for a training that takes `planned` of `free` bytes."""
    if planned * _HELD <= free:
        logger.info(
            "no accelerator: of freed blocks the C library keeps up to %.2f GB more, which is "
            "there and makes steps faster",
            planned * (_HELD - 1) / 1e9,
        )
    elif return_freed_blocks():
        logger.info(
            "no accelerator, and less than %.2f GB free: freed blocks go back to the system at "
            "once, so that the plan holds; steps take longer",
            planned * _HELD / 1e9,
        )
