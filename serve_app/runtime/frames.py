"""Tensors as raw frames behind a message's header."""

import torch
from torch import Tensor

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def tensor_header(x: Tensor) -> tuple[str, tuple[int, ...]]:
    """dtype name and shape, as the tensor-carrying messages hold them."""
    return _NAMES[x.dtype], tuple(x.shape)


def tensor_frame(x: Tensor) -> memoryview:
    """The bytes of a tensor; copies only when it is not contiguous or not in host memory."""
    return _bytes(x.cpu().contiguous())


def read_tensor(dtype: str, shape: tuple[int, ...], frame: memoryview, device: torch.device) -> Tensor:
    """A tensor of its own memory on `device` from a received frame. ValueError where frame and header disagree."""
    if dtype not in _DTYPES:
        raise ValueError(f"tensor frame of unknown dtype {dtype!r}")
    out = torch.empty(shape, dtype=_DTYPES[dtype])
    target = _bytes(out)
    if target.nbytes != frame.nbytes:
        raise ValueError(f"tensor frame of {frame.nbytes} bytes where {target.nbytes} were announced")
    target[:] = frame.cast("B")
    return out.to(device)


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor in host memory."""
    return memoryview(x.view(-1).view(torch.uint8).numpy().data)
