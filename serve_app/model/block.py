"""One shard of a transformer layer without its experts: norms, projections, rotary embedding, gate.

Norms and gate are whole on every shard; of the projections a shard has its own heads.

Shapes: T tokens, D hidden size, H query heads of this shard, J of its KV heads, N = H + J, C head size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve_app.experts.layout import HeadCut
from serve_app.model.layers import Linear, Norm
from serve_app.model.moe import SharedExpert, Weights
from serve_app.model.rope import rotate
from serve_app.model.shards import Shards, sum_over
from serve_app.model.spec import ModelSpec

Angles = tuple[Tensor, Tensor]

_SPAN_TOKENS = 128  # of elementwise work at a time, so that it stays in cache


@dataclass
class Block:
    """The weights of one layer that live with a seat."""

    spec: ModelSpec
    cut: HeadCut
    attn_norm: Norm
    qkv: Linear  # q, k and v in one product
    qk_norm: Tensor | None  # NC in fp32
    output: Linear  # its results are partial sums: those of all shards make the layer's
    mlp_norm: Norm
    gate: Linear | None  # None: a dense model
    shared: SharedExpert | None

    @classmethod
    def load(
        cls, weights: Weights, layer: int, cut: HeadCut, shard: int, dtype: torch.dtype, device: torch.device
    ) -> "Block":
        spec = weights.spec

        def read(name: str) -> Tensor:
            return weights.tensor(f"layers.{layer}.{name}")

        def heads(suffix: str) -> Tensor:
            return torch.cat([_own_heads(spec, cut, read(f"{name}{suffix}"), name) for name in ("q", "k", "v")])

        output_bias = read("o_bias") if spec.output_bias and shard == 0 else None  # once in the sum
        return cls(
            spec=spec,
            cut=cut,
            attn_norm=load_norm(weights, f"layers.{layer}.attn_norm", dtype, device),
            qkv=Linear(heads(""), heads("_bias") if spec.qkv_bias else None, dtype, device),
            qk_norm=_qk_norm(spec, cut, read("q_norm"), read("k_norm")).to(device) if spec.qk_norm != "none" else None,
            output=Linear(_own_heads(spec, cut, read("o").T, "q").T, output_bias, dtype, device),
            mlp_norm=load_norm(weights, f"layers.{layer}.mlp_norm", dtype, device),
            gate=None if spec.is_dense else Linear(read("gate"), None, dtype, device),
            shared=None if spec.shared_size is None else SharedExpert(weights, layer, dtype, device),
        )

    def project(self, h_TD: Tensor, angles: Angles, shards: Shards) -> tuple[Tensor, Tensor, Tensor]:
        """(q_THC, k_TJC, v_TJC), normed, clipped and rotated as the model wants; q carries the scores' factor."""
        spec, num_heads = self.spec, self.cut.num_heads
        num_turned = num_heads + len(self.cut.kv_heads)
        qkv = self.qkv(h_TD).view(len(h_TD), -1, spec.head_dim)
        scales = self._scales(qkv[:, :num_turned], shards)
        spans = [slice(begin, begin + _SPAN_TOKENS) for begin in range(0, len(h_TD), _SPAN_TOKENS)]
        turned = [
            self._turned(
                qkv[span, :num_turned], angles[0][span], angles[1][span], None if scales is None else scales[span]
            )
            for span in spans
        ]
        qk_TNC = turned[0] if len(turned) == 1 else torch.cat(turned)
        v_TJC = qkv[:, num_turned:]
        if spec.clip_qkv is not None:
            v_TJC = v_TJC.clamp(-spec.clip_qkv, spec.clip_qkv)
        return qk_TNC[:, :num_heads], qk_TNC[:, num_heads:], v_TJC

    def _turned(self, given_TNC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor, scales_TN1: Tensor | None) -> Tensor:
        qk_TNC = given_TNC.float()
        if self.qk_norm is not None:
            if scales_TN1 is None:
                qk_TNC = F.rms_norm(qk_TNC, qk_TNC.shape[-1:], None, self.spec.norm_eps) * self.qk_norm
            else:
                qk_TNC = qk_TNC * scales_TN1 * self.qk_norm
        if self.spec.clip_qkv is not None:
            qk_TNC.clamp_(-self.spec.clip_qkv, self.spec.clip_qkv)
        qk_TNC = rotate(qk_TNC, cos_T1C, sin_T1C)
        qk_TNC[:, : self.cut.num_heads] *= self.spec.score_scale
        return qk_TNC.to(given_TNC.dtype)

    def _scales(self, qk_TNC: Tensor, shards: Shards) -> Tensor | None:
        """TN1 in fp32: what a norm across all heads of all shards, of q and of k, multiplies each head with."""
        if self.spec.qk_norm != "full":
            return None
        num_heads, kv_heads, counted = self.cut.num_heads, self.cut.kv_heads, self.cut.counted_kv
        squares_TN = qk_TNC.float().square().sum(-1)
        counted_TJ = squares_TN[
            :, num_heads + counted.start - kv_heads.start : num_heads + counted.stop - kv_heads.start
        ]
        sums_T2 = torch.stack([squares_TN[:, :num_heads].sum(-1), counted_TJ.sum(-1)], -1)
        sizes_2 = (
            torch.tensor([self.spec.num_heads, self.spec.num_kv_heads], device=sums_T2.device) * self.spec.head_dim
        )
        scales_T2 = (sum_over(sums_T2, shards) / sizes_2 + self.spec.norm_eps).rsqrt()
        repeats = torch.tensor([num_heads, len(kv_heads)], device=scales_T2.device)
        return scales_T2.repeat_interleave(repeats, 1)[..., None]


def load_norm(weights: Weights, name: str, dtype: torch.dtype, device: torch.device) -> Norm:
    """The norm of a canonical name, of the kind that the model has."""
    bias = weights.tensor(f"{name}_bias") if weights.spec.norm == "layer" else None
    return Norm(weights.tensor(name), weights.spec.norm_eps, dtype, device, bias)


def _own_heads(spec: ModelSpec, cut: HeadCut, whole: Tensor, name: str) -> Tensor:
    """Rows of a projection of all heads that belong to this shard's, (heads * C, ...); padding heads are zeros."""
    num_heads = spec.num_heads if name == "q" else spec.num_kv_heads
    own = cut.queries if name == "q" else cut.kv_heads
    by_head = whole.reshape(num_heads, spec.head_dim, *whole.shape[1:])
    rows = by_head[[0 if head is None else head for head in own]]
    rows[[place for place, head in enumerate(own) if head is None]] = 0
    return rows.reshape(-1, *whole.shape[1:])


def _qk_norm(spec: ModelSpec, cut: HeadCut, q_norm: Tensor, k_norm: Tensor) -> Tensor:
    """The norms' weights laid out as this shard's heads are, NC in fp32."""
    if spec.qk_norm == "head":
        q_norm, k_norm = q_norm.repeat(spec.num_heads), k_norm.repeat(spec.num_kv_heads)
    rows = [_own_heads(spec, cut, q_norm, "q"), _own_heads(spec, cut, k_norm, "k")]
    return torch.cat(rows).view(-1, spec.head_dim).float()
