"""What this machine's processor is good at: which dtype to compute in, and whether weights are packed for it."""

from typing import Literal

import torch

from serve_app.errors import ConfigError

DtypeName = Literal["auto", "bfloat16", "float32"]


def pick_dtype(device: torch.device, name: DtypeName = "auto") -> torch.dtype:
    """The dtype that `name` means on `device`: "auto" is bfloat16 where its matrix products are native.

    Never float16: on CPU its matrix products are a thousand times slower. Raises ConfigError for another name.
    """
    match name:
        case "bfloat16":
            return torch.bfloat16
        case "float32":
            return torch.float32
        case "auto":
            return torch.bfloat16 if device.type == "cuda" or cpu_has_bf16() else torch.float32
    raise ConfigError(f"dtype {name!r} is not one of auto, bfloat16, float32")


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices natively (AVX512-BF16 or AMX)."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    return "AVX512" in capabilities and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN takes weights of `dtype` in its own blocked layout here: up to twice as fast at 1 to 64 rows."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch._C._has_mkldnn
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
