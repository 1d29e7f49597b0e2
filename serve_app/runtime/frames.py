"""Tensors as raw frames behind a message's header."""

import math
from typing import Protocol

import torch
from torch import Tensor

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "uint8": torch.uint8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def tensor_header(x: Tensor) -> tuple[str, tuple[int, ...]]:
    """dtype name and shape, as the tensor-carrying messages hold them."""
    return _NAMES[x.dtype], tuple(x.shape)


def tensor_frame(x: Tensor) -> memoryview:
    """The bytes of a tensor; copies only when it is not contiguous or not in host memory."""
    return _bytes(x.cpu().contiguous())


class Header(Protocol):
    """A message that announces a tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def read_tensor(header: Header, frame: memoryview | None, device: torch.device) -> Tensor:
    """A tensor of its own memory on `device` from a received frame. ValueError where frame and header disagree."""
    dtype = _DTYPES.get(header.dtype)
    if dtype is None or frame is None:
        raise ValueError(f"no tensor frame, or one of unknown dtype {header.dtype!r}")
    num_bytes = math.prod(header.shape) * dtype.itemsize
    if min(header.shape, default=0) < 0 or num_bytes != frame.nbytes:
        raise ValueError(f"tensor frame of {frame.nbytes} bytes where {num_bytes} were announced")
    out = torch.empty(header.shape, dtype=dtype)
    _bytes(out)[:] = frame.cast("B")
    return out.to(device)


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor in host memory."""
    return memoryview(x.view(-1).view(torch.uint8).numpy().data)
