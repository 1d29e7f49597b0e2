"""Mixture of experts: the gate, the experts' weights, and the combination of their outputs.

Shapes: T tokens, D hidden size, E experts, K experts per token, N = T * K rows sorted by expert, F expert width.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve_app.model.cpu import can_pack
from serve_app.model.layers import Linear
from serve_app.model.spec import ModelSpec


class Weights(Protocol):
    """Where weights come from: `Checkpoint`, or `random_checkpoint`."""

    @property
    def spec(self) -> ModelSpec: ...

    def tensor(self, name: str) -> Tensor: ...


class Experts(Protocol):
    """Runs each token through its experts, wherever they live."""

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        """The experts' outputs y_TKD, not yet weighted."""


def route(x_TD: Tensor, gate: Linear | None, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """(ids_TK, weights_TK in fp32): the K likeliest experts, likeliest first; between equals the lower id.

    SparseMixer (`spec.mixer_jitter`) weighs them in its own way.
    A dense model has no gate: every token goes to expert 0 with weight 1.
    """
    if gate is None:
        shape = (len(x_TD), 1)
        return torch.zeros(shape, dtype=torch.int64, device=x_TD.device), torch.ones(shape, device=x_TD.device)
    scores_TE = gate(x_TD).float()
    if spec.mixer_jitter is None:
        scores_TE = scores_TE.softmax(-1)
    sorted_TE, ids_TE = torch.sort(scores_TE, dim=-1, descending=True, stable=True)
    if spec.mixer_jitter is not None:
        return ids_TE[:, : spec.top_k], _mixed(sorted_TE, spec.top_k, spec.mixer_jitter)
    weights_TK = sorted_TE[:, : spec.top_k]
    if spec.norm_topk:
        weights_TK = weights_TK / _sum_in_order(weights_TK)
    return ids_TE[:, : spec.top_k], weights_TK


def _mixed(sorted_TE: Tensor, top_k: int, jitter: float) -> Tensor:
    """Weights TK of SparseMixer (arXiv 2409.12136) from descending logits.

    The k-th expert's is its softmax among those that are left and near it: within 2 * `jitter` of it, relatively.
    """
    weights = []
    for k in range(top_k):
        left_TE, best_T1 = sorted_TE[:, k:], sorted_TE[:, k : k + 1]
        is_far_TE = (best_T1 - left_TE) / left_TE.abs().clamp(min=best_T1) > 2 * jitter
        weights.append(left_TE.masked_fill(is_far_TE, -torch.inf).softmax(-1)[:, :1])
    return torch.cat(weights, 1)


def _sum_in_order(weights_TK: Tensor) -> Tensor:
    """T1: one addition after another, so that no kernel chooses the order."""
    total_T1 = weights_TK[:, :1]
    for k in range(1, weights_TK.shape[1]):
        total_T1 = total_T1 + weights_TK[:, k : k + 1]
    return total_T1


def group_by_expert(ids_TK: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """Sort the rows (token, k) by expert, keeping token order within each.

    Returns (order_N, experts, counts): order_N holds token * K + k; `experts` are those with rows, ascending, and
    `counts` their numbers of rows.
    """
    flat_N = ids_TK.reshape(-1)
    num_rows = torch.bincount(flat_N).tolist()
    experts = [expert for expert, count in enumerate(num_rows) if count]
    return torch.argsort(flat_N, stable=True), experts, [num_rows[expert] for expert in experts]


def combine(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum over K in top-k order, in fp32. Shape TD."""
    total_TD = y_TKD[:, 0] * weights_TK[:, 0, None]
    for k in range(1, y_TKD.shape[1]):
        total_TD += y_TKD[:, k] * weights_TK[:, k, None]
    return total_TD


class LocalExperts:
    """`Experts` that all live in one host, in this process."""

    def __init__(self, host: "ExpertHost") -> None:
        self._host = host

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        order_N, experts, counts = group_by_expert(ids_TK)
        rows_ND = x_TD.index_select(0, order_N // ids_TK.shape[1])
        y_ND = self._host.forward(layer, rows_ND, experts, counts)
        return torch.empty_like(y_ND).index_copy_(0, order_N, y_ND).view(*ids_TK.shape, -1)


class SharedExpert:
    """An expert that every token goes through where it is at home: sigmoid(gate(x)) * down(silu(gate(x)) * up(x))."""

    def __init__(self, weights: Weights, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        """Read and pack it. Raises KeyError where the model has none."""
        name = f"layers.{layer}.shared"
        gate_up = torch.cat([weights.tensor(f"{name}.gate"), weights.tensor(f"{name}.up")])
        self._gate_up = Linear(gate_up, None, dtype, device)
        self._down = Linear(weights.tensor(f"{name}.down"), None, dtype, device)
        self._gate = Linear(weights.tensor(f"{name}_gate"), None, dtype, device)
        self._width = len(gate_up) // 2

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Shape TD, in fp32."""
        y_TD = self._down(_silu_mul(self._gate_up(x_TD), self._width))
        return y_TD.float() * self._gate(x_TD).float().sigmoid()


class ExpertHost:
    """The weights of a set of (layer, expert), and the arithmetic of them: down(silu(gate(x)) * up(x)).

    On CUDA in bf16 one grouped GEMM runs a layer's experts (exercised only where there is CUDA); elsewhere one after
    another. Where oneDNN packs weights (20 ms an expert of 2.7 M values), an expert that is wanted at once is mapped
    first: run from where the checkpoint has it, with the same bits, at up to twice the time.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._width = spec.expert_size
        self._gate_up: dict[tuple[int, int], Linear] = {}  # weights (2F, D): gate above up
        self._mapped: dict[tuple[int, int], _GateUp] = {}  # the same of those that are not packed, oldest first
        self._down: dict[tuple[int, int], Linear] = {}  # of all
        self._stacks: dict[int, _Stack] = {}  # CUDA only

    def load(self, weights: Weights, layer: int, expert: int) -> None:
        """Read and pack one expert. Raises KeyError where the checkpoint has no such expert."""
        self._hold(layer, expert, *_parts(weights, layer, expert))

    def map(self, weights: Weights, layer: int, expert: int) -> None:
        """Hold one expert without reading it, where it is stored in this dtype; `pack` it later. KeyError as `load`.

        Where nothing is packed, this is `load`.
        """
        if not can_pack(self.device, self.dtype):
            self.load(weights, layer, expert)
            return
        parts = _parts(weights, layer, expert)
        gate, up, down = (Linear(part, None, self.dtype, self.device, pack=False) for part in parts)
        self._gate_up.pop((layer, expert), None)
        self._mapped[layer, expert], self._down[layer, expert] = _GateUp(gate, up), down

    def pack(self, layer: int, expert: int) -> None:
        """Read and pack an expert that is mapped, and let go of the mapping. Raises KeyError where it is not mapped."""
        mapped = self._mapped[layer, expert]
        self._hold(layer, expert, mapped.gate.weight, mapped.up.weight, self._down[layer, expert].weight)

    def pack_next(self) -> bool:
        """Pack the expert that is mapped longest. False where none is."""
        if not self._mapped:
            return False
        self.pack(*next(iter(self._mapped)))
        return True

    @property
    def num_mapped(self) -> int:
        """Experts that are not packed yet."""
        return len(self._mapped)

    def holds(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._down

    def drop(self, layer: int, expert: int) -> None:
        """Free one expert's weights. Raises KeyError where it is not held."""
        del self._down[layer, expert]
        self._gate_up.pop((layer, expert), None)
        self._mapped.pop((layer, expert), None)
        self._stacks.pop(layer, None)

    def forward(self, layer: int, x_ND: Tensor, experts: list[int], counts: list[int]) -> Tensor:
        """Rows sorted by expert (first counts[0] rows of experts[0], ...; `experts` ascending) -> y_ND."""
        with torch.inference_mode():
            if self.device.type == "cuda" and self.dtype == torch.bfloat16:
                return self._stack(layer).forward(x_ND, experts, counts)
            gate_up = [self._mapped.get((layer, expert)) or self._gate_up[layer, expert] for expert in experts]
            down = [self._down[layer, expert] for expert in experts]
            return _run_each(down, _silu_mul(_run_each(gate_up, x_ND, counts), self._width), counts)

    def _hold(self, layer: int, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
        gate_up = Linear(torch.cat([gate, up]), None, self.dtype, self.device)
        self._down[layer, expert] = Linear(down, None, self.dtype, self.device)
        self._gate_up[layer, expert] = gate_up
        self._mapped.pop((layer, expert), None)
        self._stacks.pop(layer, None)

    def _stack(self, layer: int) -> "_Stack":
        if layer not in self._stacks:
            held = sorted(expert for of_layer, expert in self._gate_up if of_layer == layer)
            gate_up = [self._gate_up[layer, expert] for expert in held]
            self._stacks[layer] = _Stack(held, gate_up, [self._down[layer, expert] for expert in held])
        return self._stacks[layer]


def _parts(weights: Weights, layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate FD, up FD and down DF, as the checkpoint has them."""
    name = f"layers.{layer}.experts.{expert}"
    return weights.tensor(f"{name}.gate"), weights.tensor(f"{name}.up"), weights.tensor(f"{name}.down")


class _GateUp:
    """Gate and up that lie apart, as one product whose columns are those of both."""

    def __init__(self, gate: Linear, up: Linear) -> None:
        self.gate, self.up = gate, up

    def __call__(self, x_NI: Tensor) -> Tensor:
        return torch.cat([self.gate(x_NI), self.up(x_NI)], 1)


def _run_each(linears: Sequence[Linear | _GateUp], x_NI: Tensor, counts: list[int]) -> Tensor:
    if len(linears) == 1:
        return linears[0](x_NI)
    return torch.cat([linear(part) for linear, part in zip(linears, torch.split(x_NI, counts), strict=True)])


def _silu_mul(gate_up_NF: Tensor, width: int) -> Tensor:
    return F.silu(gate_up_NF[:, :width]).mul_(gate_up_NF[:, width:])


class _Stack:
    """A layer's experts in two tensors for `grouped_mm` on CUDA; the single weights become views of them."""

    def __init__(self, held: list[int], gate_up: list[Linear], down: list[Linear]) -> None:
        self._held = held
        self._gate_up_EFD, self._down_EDF = _stacked(gate_up), _stacked(down)

    def forward(self, x_ND: Tensor, experts: list[int], counts: list[int]) -> Tensor:
        num_rows = dict(zip(experts, counts, strict=True))
        counts_E = torch.tensor([num_rows.get(expert, 0) for expert in self._held])
        ends_E = counts_E.cumsum(0).to(x_ND.device, torch.int32)
        gate_up_NF = F.grouped_mm(x_ND, self._gate_up_EFD.transpose(1, 2), offs=ends_E)
        inner_NF = _silu_mul(gate_up_NF, self._down_EDF.shape[2])
        return F.grouped_mm(inner_NF, self._down_EDF.transpose(1, 2), offs=ends_E)


def _stacked(linears: list[Linear]) -> Tensor:
    stack = torch.stack([linear.weight for linear in linears])
    for linear, weight in zip(linears, stack, strict=True):
        linear.weight = weight
    return stack
