"""Consecutive layers of a model with their KV cache: what one worker of a pipeline computes.

A shard has some of the attention heads, for all tokens of its replica, and everything else for some of the tokens.

Shapes: T tokens of the step, S of them at home on this shard, D hidden size, H query heads of this shard, J of its KV
heads, C head size, R rows that are sampled, V vocabulary (of this shard where a weight or its product is meant).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serve_app.experts.layout import cut, cut_heads
from serve_app.model.attention import PagedKV, attend
from serve_app.model.batch import Batch
from serve_app.model.block import Block, load_norm
from serve_app.model.layers import Linear, Norm
from serve_app.model.moe import Experts, Weights, combine, route
from serve_app.model.rope import Rope
from serve_app.model.shards import Alone, Shards, add_partials, embed, gather, homes, join_columns, scaled
from serve_app.model.spec import ModelSpec
from serve_app.model.tiles import Heads, plan_attention
from serve_app.model.timing import Part, StepTimer

MAX_TIED = 64  # first places that are recomputed; a row where more are equal says nothing worth the memory


def kv_bytes_per_page(spec: ModelSpec, num_layers: int, num_kv_heads: int, page_tokens: int, dtype: torch.dtype) -> int:
    """Bytes that the K and V of one page take in `num_layers` layers and `num_kv_heads` heads."""
    return 2 * num_layers * page_tokens * num_kv_heads * spec.head_dim * dtype.itemsize


@dataclass
class Stage:
    """Layers [layers.start, layers.stop), with the embedding before the model's first and the head after its last."""

    spec: ModelSpec
    layers: range
    num_shards: int
    shard: int
    page_tokens: int
    device: torch.device
    heads: Heads
    kv: PagedKV
    rope: Rope
    blocks: list[Block]
    vocab: range  # the rows of embedding and head that this shard has
    embed_VD: Tensor | None  # on the first stage
    norm: Norm | None  # on the last
    head: Linear | None  # on the last
    head_VD: Tensor | None  # on the last: the head's weight as the checkpoint has it, for `_sharpen`
    head_bias_V: Tensor | None  # on the last, where the model has one: as the checkpoint has it
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
        num_shards: int = 1,
        shard: int = 0,
        timer: StepTimer | None = None,
    ) -> "Stage":
        """Read all but the experts of `layers`. Raises ValueError where `page_tokens` does not divide the KV block."""
        spec = weights.spec
        own = cut_heads(spec.num_heads, spec.num_kv_heads, num_shards, shard)
        heads = Heads(own.num_heads, len(own.kv_heads), spec.head_dim)
        vocab = cut(spec.vocab_size, num_shards, shard)
        is_last = layers.stop == spec.num_layers
        head_VD = _head_weight(weights)[vocab.start : vocab.stop] if is_last else None
        bias_V = weights.tensor("head_bias")[vocab.start : vocab.stop] if is_last and spec.head_bias else None
        return cls(
            spec=spec,
            layers=layers,
            num_shards=num_shards,
            shard=shard,
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
            blocks=[Block.load(weights, layer, own, shard, dtype, device) for layer in layers],
            vocab=vocab,
            embed_VD=weights.tensor("embed")[vocab.start : vocab.stop].to(device, dtype) if layers.start == 0 else None,
            norm=load_norm(weights, "norm", dtype, device) if is_last else None,
            head=None if head_VD is None else Linear(head_VD, bias_V, dtype, device),
            head_VD=None if head_VD is None else head_VD.to(device),
            head_bias_V=None if bias_V is None else bias_V.to(device),
            timer=timer,
        )

    @property
    def is_first(self) -> bool:
        return self.embed_VD is not None

    @property
    def is_last(self) -> bool:
        return self.head is not None

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden_SD: Tensor | None, experts: Experts, shards: Shards | None = None) -> Tensor:
        """One step. The first stage takes None for `hidden_SD`, the others what the stage before returned.

        Returns the next stage's `hidden_SD`, the rows of this shard's tokens; on the last stage logits_RV over the
        whole vocabulary, one row for each slice that has `sample`, in plan order: all of them on shard 0, none on the
        others. Both are fp32 whatever the stage's dtype: layers add to the residual stream little by little, and bf16
        would round each time (a third of the distance to the fp32 logits on the demo model). Writes the step's keys
        and values into the stage's pages, and over `hidden_SD`.
        """
        shards = shards or Alone()
        assert (shards.num, shards.index) == (self.num_shards, self.shard), "these are not this stage's shards"
        if self.timer:
            self.timer.start()
        x_SD = self._enter(batch, hidden_SD, shards)
        work = plan_attention(batch, self.heads)
        angles = self.rope.at(batch.positions_T)
        self._lap("other")
        for index, block in enumerate(self.blocks):
            h_TD = self._gathered(batch, block.attn_norm(x_SD), shards)
            q_THC, k_TJC, v_TJC = block.project(h_TD, angles, shards)
            self._lap("other")
            self.kv.write(index, work, k_TJC, v_TJC)
            attended = attend(self.kv, index, work, q_THC)
            self._lap("attention")
            partial_TD = block.output(attended)
            self._lap("other")
            add_partials(x_SD, partial_TD, shards, self.spec.residual_scale)
            self._lap("shards")
            if len(x_SD):
                x_SD += scaled(self._moe(self.layers[index], block, x_SD, experts), self.spec.residual_scale)
        return self._leave(batch, x_SD, shards)

    def _moe(self, layer: int, block: Block, x_SD: Tensor, experts: Experts) -> Tensor:
        h_SD = block.mlp_norm(x_SD)
        ids_SK, weights_SK = route(h_SD, block.gate, self.spec)
        self._lap("other")
        mixed_SD = combine(experts(layer, h_SD, ids_SK), weights_SK)
        if block.shared is not None:
            mixed_SD += block.shared(h_SD)
        self._lap("experts")
        return mixed_SD

    def _gathered(self, batch: Batch, h_SD: Tensor, shards: Shards) -> Tensor:
        self._lap("other")
        h_TD = gather(h_SD, [len(home) for home in homes(len(batch.positions), shards)], shards)
        self._lap("shards")
        return h_TD

    def _enter(self, batch: Batch, hidden_SD: Tensor | None, shards: Shards) -> Tensor:
        if self.embed_VD is not None:
            x_SD = embed(self.embed_VD, self.vocab, self.spec.vocab_size, batch.token_ids_T, shards).float()
            return scaled(x_SD, self.spec.embedding_scale)
        assert hidden_SD is not None, "only the first stage begins from token ids"
        return hidden_SD

    def _leave(self, batch: Batch, x_SD: Tensor, shards: Shards) -> Tensor:
        if self.head is None or self.norm is None or self.head_VD is None:
            return x_SD
        if not len(batch.sample_rows_R):
            return x_SD.new_empty(0, self.spec.vocab_size)
        x_RD = self._sampled(batch, x_SD, self.norm, shards)
        logits_RV = _sharpen(self.head(x_RD), x_RD, self.head_VD, self.head_bias_V)
        if self.spec.logits_divisor != 1.0:
            logits_RV /= self.spec.logits_divisor
        logits_RV = join_columns(logits_RV, self.spec.vocab_size, shards)
        self._lap("head")
        return logits_RV

    def _sampled(self, batch: Batch, x_SD: Tensor, norm: Norm, shards: Shards) -> Tensor:
        """The normed rows that are sampled, from all shards, RD."""
        ends = [home.stop for home in homes(len(batch.positions), shards)]
        bounds = np.searchsorted(batch.sample_rows, [0, *ends])  # of the sampled rows at home on each shard
        own = batch.sample_rows_R[bounds[shards.index] : bounds[shards.index + 1]]
        begin = ends[shards.index] - len(x_SD)
        return gather(norm(x_SD[own - begin]), np.diff(bounds).tolist(), shards)

    def _lap(self, part: Part) -> None:
        if self.timer:
            self.timer.lap(part)


def _head_weight(weights: Weights) -> Tensor:
    return weights.tensor("embed" if weights.spec.tie_embeddings else "head")


def _sharpen(logits_RV: Tensor, x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Logits in fp32, the highest of each row recomputed in fp32 where bf16 could not tell them apart.

    At the size of real logits two neighbours in bf16 are 0.125 apart, so that several tokens share the first place in
    about one row of twenty, and an argmax would choose by token id. Rounding keeps order: no other token can be first.
    """
    if logits_RV.dtype == torch.float32:
        return logits_RV
    top_RM, ids_RM = logits_RV.topk(min(MAX_TIED + 1, logits_RV.shape[1]))
    is_tied_RM = (top_RM == top_RM[:, :1]) & (top_RM[:, -1:] != top_RM[:, :1])
    rows_C, places_C = is_tied_RM.nonzero(as_tuple=True)
    ids_C = ids_RM[rows_C, places_C]
    tied_C = (x_RD[rows_C].float() * weight_VD[ids_C].float()).sum(-1)
    logits_RV = logits_RV.float()
    logits_RV[rows_C, ids_C] = tied_C if bias_V is None else tied_C + bias_V[ids_C].float()
    return logits_RV
