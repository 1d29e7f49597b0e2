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


def padded_rows(num_rows: int, num_inputs: int) -> int:
    """How many rows a product is computed with, so that its row's bits hold and few sizes occur.

    oneDNN compiles a kernel for every number of rows: 5.6 ms and 1.3 MB each, measured, and the rows of an expert are
    any number. Up to 16 rows the weights' way from memory takes the time, so that more rows cost nothing.
    """
    if num_rows == 1:
        return 1 if num_inputs <= SINGLE_ROW_MAX_INPUTS else 2
    if num_rows <= 16:
        return 1 << (num_rows - 1).bit_length()
    multiple = 16 if num_rows <= 64 else 32 if num_rows <= 256 else 128
    return -(-num_rows // multiple) * multiple


class Linear:
    """x_TI -> x_TI @ weight_OI.T + bias_O. On a CPU with bf16 the weight is packed once, here, for oneDNN.

    Where it is not to be packed it is used as it lies, without a copy if dtype and device are those already.
    In bf16 on CPU a row's result is the same bits at every T and number of threads, packed or not.
    """

    def __init__(
        self,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        pack: bool = True,
    ) -> None:
        weight = weight_OI.to(device, dtype).contiguous()
        self._bias = None if bias_O is None else bias_O.to(device, dtype)
        self._is_onednn = can_pack(device, dtype)
        self.is_packed = pack and self._is_onednn
        self._pads = device.type == "cpu" and dtype == torch.bfloat16
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.is_packed else weight

    def __call__(self, x_TI: Tensor) -> Tensor:
        num_rows = len(x_TI)
        padded = padded_rows(num_rows, x_TI.shape[1]) if self._pads else num_rows
        if padded == num_rows:
            return self._product(x_TI)
        return self._product(F.pad(x_TI, (0, 0, 0, padded - num_rows)))[:num_rows]

    def _product(self, x_TI: Tensor) -> Tensor:
        # For a weight that is not packed too: in products of up to 4,096 multiplications `F.linear` has other bits.
        if self._is_onednn:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self.weight, self._bias, "none", [], "")
            return y
        return F.linear(x_TI, self.weight, self._bias)


class Norm:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467): fp32 in, `dtype` out.

    With a bias it is a LayerNorm (arXiv 1607.06450).
    """

    def __init__(
        self,
        weight_D: Tensor,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
        bias_D: Tensor | None = None,
    ) -> None:
        self._weight = weight_D.to(device, torch.float32)
        self._bias = None if bias_D is None else bias_D.to(device, torch.float32)
        self._dtype = dtype
        self._eps = eps

    def __call__(self, x_TD: Tensor) -> Tensor:
        if self._bias is not None:
            return F.layer_norm(x_TD, self._weight.shape, self._weight, self._bias, self._eps).to(self._dtype)
        return F.rms_norm(x_TD, self._weight.shape, self._weight, self._eps).to(self._dtype)
