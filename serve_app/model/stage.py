"""Consecutive layers of a model with their KV cache: what one worker of a pipeline computes.

Shapes: T tokens of the step, D hidden size, H query heads, N query and KV heads together, C head size,
R rows that are sampled, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from serve_app.model.attention import PagedKV, attend
from serve_app.model.batch import Batch
from serve_app.model.block import Block
from serve_app.model.layers import Linear, Norm
from serve_app.model.moe import Experts, Weights, combine, route
from serve_app.model.rope import Rope
from serve_app.model.spec import ModelSpec
from serve_app.model.tiles import Heads, plan_attention
from serve_app.model.timing import Part, StepTimer

MAX_TIED = 64  # first places that are recomputed; a row where more are equal says nothing worth the memory


def kv_bytes_per_page(spec: ModelSpec, num_layers: int, page_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of K and V that one page takes in a stage of `num_layers` layers."""
    return 2 * num_layers * page_tokens * spec.num_kv_heads * spec.head_dim * dtype.itemsize


@dataclass
class Stage:
    """Layers [layers.start, layers.stop), with the embedding before the model's first and the head after its last."""

    spec: ModelSpec
    layers: range
    page_tokens: int
    device: torch.device
    heads: Heads
    kv: PagedKV
    rope: Rope
    blocks: list[Block]
    embed_VD: Tensor | None  # on the first stage
    norm: Norm | None  # on the last
    head: Linear | None  # on the last
    head_VD: Tensor | None  # on the last: the head's weight as the checkpoint has it, for `_sharpen`
    timer: StepTimer | None = None

    @classmethod
    def load(
        cls,
        weights: Weights,
        layers: range,
        *,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        timer: StepTimer | None = None,
    ) -> "Stage":
        """Read all but the experts of `layers`. Raises ValueError where `page_tokens` does not divide the KV block."""
        spec = weights.spec
        heads = Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        is_last = layers.stop == spec.num_layers
        return cls(
            spec=spec,
            layers=layers,
            page_tokens=page_tokens,
            device=device,
            heads=heads,
            kv=PagedKV(
                heads,
                num_layers=len(layers),
                num_pages=num_pages,
                page_tokens=page_tokens,
                dtype=dtype,
                device=device,
            ),
            rope=Rope(spec.rope, spec.head_dim, min(spec.max_positions, num_pages * page_tokens), device),
            blocks=[Block.load(weights, layer, dtype, device) for layer in layers],
            embed_VD=weights.tensor("embed").to(device, dtype) if layers.start == 0 else None,
            norm=Norm(weights.tensor("norm"), spec.norm_eps, dtype, device) if is_last else None,
            head=Linear(_head_weight(weights), None, dtype, device) if is_last else None,
            head_VD=_head_weight(weights).to(device) if is_last else None,
            timer=timer,
        )

    @property
    def is_first(self) -> bool:
        return self.embed_VD is not None

    @property
    def is_last(self) -> bool:
        return self.head is not None

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden_TD: Tensor | None, experts: Experts) -> Tensor:
        """One step. The first stage takes None for `hidden_TD`, the others what the stage before returned.

        Returns the next stage's `hidden_TD`; on the last stage logits_RV, one row for each slice that has `sample`, in
        plan order. Both are fp32 whatever the stage's dtype: layers add to the residual stream little by little, and
        bf16 would round each time (a third of the distance to the fp32 logits on the demo model). Writes the step's
        keys and values into the stage's pages, and over `hidden_TD`.
        """
        if self.timer:
            self.timer.start()
        x_TD = self._enter(batch, hidden_TD)
        work = plan_attention(batch, self.heads)
        angles = self.rope.at(batch.positions_T)
        self._lap("other")
        for index, block in enumerate(self.blocks):
            q_THC, k_TNC, v_TNC = block.project(x_TD, angles)
            self._lap("other")
            self.kv.write(index, work, k_TNC, v_TNC)
            attended = attend(self.kv, index, work, q_THC)
            self._lap("attention")
            x_TD += block.output(attended)
            h_TD = block.mlp_norm(x_TD)
            ids_TK, weights_TK = route(h_TD, block.gate, self.spec)
            self._lap("other")
            y_TKD = experts(self.layers[index], h_TD, ids_TK)
            x_TD += combine(y_TKD, weights_TK)
            self._lap("experts")
        return self._leave(batch, x_TD)

    def _enter(self, batch: Batch, hidden_TD: Tensor | None) -> Tensor:
        if self.embed_VD is not None:
            return self.embed_VD[batch.token_ids_T].float()
        assert hidden_TD is not None, "only the first stage begins from token ids"
        return hidden_TD

    def _leave(self, batch: Batch, x_TD: Tensor) -> Tensor:
        if self.head is None or self.norm is None or self.head_VD is None:
            return x_TD
        if not len(batch.sample_rows_R):
            return x_TD.new_empty(0, self.spec.vocab_size)
        x_RD = self.norm(x_TD[batch.sample_rows_R])
        logits_RV = _sharpen(self.head(x_RD), x_RD, self.head_VD)
        self._lap("head")
        return logits_RV

    def _lap(self, part: Part) -> None:
        if self.timer:
            self.timer.lap(part)


def _head_weight(weights: Weights) -> Tensor:
    return weights.tensor("embed" if weights.spec.tie_embeddings else "head")


def _sharpen(logits_RV: Tensor, x_RD: Tensor, weight_VD: Tensor) -> Tensor:
    """Logits in fp32, the highest of each row recomputed in fp32 where bf16 could not tell them apart.

    At the size of real logits two neighbours in bf16 are 0.125 apart, so that several tokens share the first place in
    about one row of twenty, and an argmax would choose by token id. Rounding keeps order: no other token can be first.
    """
    if logits_RV.dtype == torch.float32:
        return logits_RV
    logits_RV = logits_RV.float()
    is_top_RV = logits_RV == logits_RV.amax(-1, keepdim=True)
    is_top_RV &= is_top_RV.sum(-1, keepdim=True) <= MAX_TIED
    rows_C, ids_C = is_top_RV.nonzero(as_tuple=True)
    logits_RV[rows_C, ids_C] = (x_RD[rows_C].float() * weight_VD[ids_C].float()).sum(-1)
    return logits_RV
