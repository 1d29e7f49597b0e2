"""The two layers that everything is made of.

Shapes: T rows, I inputs, O outputs, D normalised width.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve_app.model.cpu import can_pack

# oneDNN sums longer inputs in blocks, but not those of a matrix of one row: over 64 shapes measured, a row's bits are
# the same at every number of rows from 2 to 1024, and at 1 too up to this many inputs.
SINGLE_ROW_MAX_INPUTS = 1024


class Linear:
    """x_TI -> x_TI @ weight_OI.T + bias_O. On a CPU with bf16 the weight is packed once, here, for oneDNN.

    In bf16 on CPU a row's result is the same bits at every T and number of threads.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        weight = weight_OI.to(device, dtype).contiguous()
        self._bias = None if bias_O is None else bias_O.to(device, dtype)
        self.is_packed = can_pack(device, dtype)
        self._doubles_single_rows = device.type == "cpu" and weight.shape[1] > SINGLE_ROW_MAX_INPUTS
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.is_packed else weight

    def __call__(self, x_TI: Tensor) -> Tensor:
        if self._doubles_single_rows and len(x_TI) == 1:
            return self._product(x_TI.repeat(2, 1))[:1]
        return self._product(x_TI)

    def _product(self, x_TI: Tensor) -> Tensor:
        if self.is_packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self.weight, self._bias, "none", [], "")
            return y
        return F.linear(x_TI, self.weight, self._bias)


class Norm:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467): fp32 in, `dtype` out."""

    def __init__(self, weight_D: Tensor, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        self._weight = weight_D.to(device, torch.float32)
        self._dtype = dtype
        self._eps = eps

    def __call__(self, x_TD: Tensor) -> Tensor:
        return F.rms_norm(x_TD, self._weight.shape, self._weight, self._eps).to(self._dtype)
