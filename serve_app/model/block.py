"""One transformer layer without its experts: norms, projections, rotary embedding, gate.

Shapes: T tokens, D hidden size, H query heads, J KV heads, N = H + J, C head size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve_app.model.layers import Linear, Norm
from serve_app.model.moe import Weights
from serve_app.model.rope import rotate
from serve_app.model.spec import ModelSpec

Angles = tuple[Tensor, Tensor]

_SPAN_TOKENS = 128  # of elementwise work at a time, so that it stays in cache


@dataclass
class Block:
    """The weights of one layer that live with its home worker."""

    spec: ModelSpec
    attn_norm: Norm
    qkv: Linear  # q, k and v in one product
    qk_norm: Tensor | None  # NC in fp32
    output: Linear
    mlp_norm: Norm
    gate: Linear | None  # None: a dense model

    @classmethod
    def load(cls, weights: Weights, layer: int, dtype: torch.dtype, device: torch.device) -> "Block":
        spec = weights.spec

        def read(name: str) -> Tensor:
            return weights.tensor(f"layers.{layer}.{name}")

        def biases(*names: str) -> Tensor | None:
            return torch.cat([read(f"{name}_bias") for name in names]) if spec.attention_bias else None

        return cls(
            spec=spec,
            attn_norm=Norm(read("attn_norm"), spec.norm_eps, dtype, device),
            qkv=Linear(torch.cat([read("q"), read("k"), read("v")]), biases("q", "k", "v"), dtype, device),
            qk_norm=_qk_norm(spec, read("q_norm"), read("k_norm")).to(device) if spec.qk_norm != "none" else None,
            output=Linear(read("o"), biases("o"), dtype, device),
            mlp_norm=Norm(read("mlp_norm"), spec.norm_eps, dtype, device),
            gate=None if spec.is_dense else Linear(read("gate"), None, dtype, device),
        )

    def project(self, x_TD: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """(q_THC, k_TJC, v_TJC), normed, clipped and rotated as the model wants; q carries 1 / sqrt(C)."""
        spec = self.spec
        num_turned = spec.num_heads + spec.num_kv_heads
        qkv = self.qkv(self.attn_norm(x_TD)).view(len(x_TD), -1, spec.head_dim)
        spans = [slice(begin, begin + _SPAN_TOKENS) for begin in range(0, len(x_TD), _SPAN_TOKENS)]
        turned = [self._turned(qkv[span, :num_turned], angles[0][span], angles[1][span]) for span in spans]
        qk_TNC = turned[0] if len(turned) == 1 else torch.cat(turned)
        v_TJC = qkv[:, num_turned:]
        if spec.clip_qkv is not None:
            v_TJC = v_TJC.clamp(-spec.clip_qkv, spec.clip_qkv)
        return qk_TNC[:, : spec.num_heads], qk_TNC[:, spec.num_heads :], v_TJC

    def _turned(self, given_TNC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
        qk_TNC = given_TNC.float()
        if self.qk_norm is not None:
            qk_TNC = self._normed(qk_TNC, self.qk_norm)
        if self.spec.clip_qkv is not None:
            qk_TNC.clamp_(-self.spec.clip_qkv, self.spec.clip_qkv)
        qk_TNC = rotate(qk_TNC, cos_T1C, sin_T1C)
        qk_TNC[:, : self.spec.num_heads] *= self.spec.head_dim**-0.5
        return qk_TNC.to(given_TNC.dtype)

    def _normed(self, qk_TNC: Tensor, weight_NC: Tensor) -> Tensor:
        if self.spec.qk_norm == "head":
            return F.rms_norm(qk_TNC, qk_TNC.shape[-1:], None, self.spec.norm_eps) * weight_NC
        sides = (qk_TNC[:, : self.spec.num_heads], qk_TNC[:, self.spec.num_heads :])
        return torch.cat([F.rms_norm(x, x.shape[1:], None, self.spec.norm_eps) for x in sides], 1) * weight_NC


def _qk_norm(spec: ModelSpec, q_norm: Tensor, k_norm: Tensor) -> Tensor:
    """The norms' weights laid out as the heads are, NC in fp32."""
    if spec.qk_norm == "head":
        q_norm, k_norm = q_norm.expand(spec.num_heads, -1), k_norm.expand(spec.num_kv_heads, -1)
    return torch.cat([q_norm.reshape(-1), k_norm.reshape(-1)]).view(-1, spec.head_dim).float()
