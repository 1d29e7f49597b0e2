"""Rotary position embedding (arXiv 2104.09864) and the scalings that the families' configs use.

Shapes: T tokens, N heads, D head size, H = D / 2 frequencies, P positions. All in fp32.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from serve_app.model.spec import RopeSpec


class Rope:
    """Cosines and sines of all positions below `num_positions`, so that a row's angle depends on its position only."""

    def __init__(self, rope: RopeSpec, head_dim: int, num_positions: int, device: torch.device) -> None:
        angles_PH = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse_frequencies(rope, head_dim))
        scale = attention_factor(rope)
        cos_PH, sin_PH = angles_PH.cos() * scale, angles_PH.sin() * scale
        self._cos_PD = torch.cat([cos_PH, cos_PH], -1).to(device)
        self._sin_PD = torch.cat([-sin_PH, sin_PH], -1).to(device)

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """What `rotate` needs for these positions: two tensors T1D."""
        return self._cos_PD[positions_T].unsqueeze(1), self._sin_PD[positions_T].unsqueeze(1)


def rotate(x_TND: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Turn the pair (x[d], x[d + D/2]) of each head by its token's angle. fp32 in, fp32 out."""
    swapped_TND = x_TND.roll(x_TND.shape[-1] // 2, -1)
    return (x_TND * cos_T1D).add_(swapped_TND.mul_(sin_T1D))


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Radians per position of each of the `head_dim` / 2 pairs."""
    plain_H: Tensor = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    match rope.kind:
        case "default":
            return plain_H
        case "linear":
            return plain_H.div(rope.params["factor"])
        case "llama3":
            return _llama3(plain_H, rope)
        case "yarn":
            return _yarn(plain_H, rope)
        case "longrope":
            return plain_H.div(torch.tensor(rope.params["short_factor"]))


def attention_factor(rope: RopeSpec) -> float:
    """The factor on cosines and sines where the config does not give it.

    YaRN: arXiv 2309.00071, section 3.4. LongRoPE: arXiv 2402.13753, as transformers has it.
    """
    params = rope.params
    if params.get("attention_factor") is not None:
        return float(params["attention_factor"])
    match rope.kind:
        case "yarn":
            return _yarn_attention(params)
        case "longrope" if params["factor"] > 1:
            return math.sqrt(1 + math.log(params["factor"]) / math.log(params["original_max_position_embeddings"]))
        case _:
            return 1.0


def _yarn_attention(params: Mapping[str, Any]) -> float:
    if params.get("mscale") and params.get("mscale_all_dim"):
        return _mscale(params["factor"], params["mscale"]) / _mscale(params["factor"], params["mscale_all_dim"])
    return _mscale(params["factor"], 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(plain_H: Tensor, rope: RopeSpec) -> Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between blended."""
    params = rope.params
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    num_turns_H = params["original_max_position_embeddings"] * plain_H / (2 * math.pi)
    kept_H = ((num_turns_H - low) / (high - low)).clamp(0, 1)
    return plain_H.mul((1 - kept_H) / params["factor"] + kept_H)


def _yarn(plain_H: Tensor, rope: RopeSpec) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): pairs that turn often are kept, slow ones stretched by `factor`."""
    params = rope.params
    head_dim = 2 * len(plain_H)
    low = _pair_of_turns(rope, head_dim, params.get("beta_fast") or 32)
    high = _pair_of_turns(rope, head_dim, params.get("beta_slow") or 1)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    stretched_H = ((torch.arange(len(plain_H), dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain_H.mul(stretched_H / params["factor"] + (1 - stretched_H))


def _pair_of_turns(rope: RopeSpec, head_dim: int, num_turns: float) -> float:
    """Which pair makes `num_turns` full turns over the original context (a real number; equation 16)."""
    context = rope.params["original_max_position_embeddings"]
    return head_dim * math.log(context / (num_turns * 2 * math.pi)) / (2 * math.log(rope.theta))
