"""Where in a process's memory its weights go, so that a step's tensors find their own place again and again."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them
_LASTING_BYTES = 128 << 10  # as glibc begins
_PASSING_BYTES = 32 << 20  # the most that glibc takes, and comes to by itself where tensors of that size are freed


@contextmanager
def lasting_memory() -> Iterator[None]:
    """What is allocated within is there to stay: every tensor lies on pages of its own.

    Otherwise packing leaves holes between the weights, a quarter of their size, over which the tensors of later steps
    spread until all of them are resident. With another allocator than glibc's nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _LASTING_BYTES)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _PASSING_BYTES)
        mallopt(_TRIM_THRESHOLD, 2 * _PASSING_BYTES)
