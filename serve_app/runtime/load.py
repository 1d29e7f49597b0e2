"""From weights to a stage that can run: what a worker and the in-process executor both begin with."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from serve_app.config import OctavoConfig
from serve_app.errors import ConfigError
from serve_app.model.cpu import pick_dtype
from serve_app.model.moe import ExpertHost, Weights
from serve_app.model.spec import ModelSpec
from serve_app.model.stage import Stage, kv_bytes_per_page
from serve_app.model.timing import StepTimer
from serve_app.runtime.settings import max_context_tokens

Pair = tuple[int, int]  # (layer, expert)


@dataclass
class Loaded:
    """A stage, the experts that live beside it, and where more of them come from."""

    weights: Weights
    stage: Stage
    host: ExpertHost
    num_pages: int
    hosted: set[Pair]
    load_s: float = 0.0

    def host_experts(self, pairs: list[Pair]) -> None:
        """Hold exactly these experts' weights: drop the others, read the missing ones."""
        wanted = set(pairs)
        for pair in self.hosted - wanted:
            self.host.drop(*pair)
        for pair in sorted(wanted - self.hosted):
            self.host.load(self.weights, *pair)
        self.hosted = wanted


def load(
    weights: Weights, config: OctavoConfig, layers: range, pairs: list[Pair], timer: StepTimer | None = None
) -> Loaded:
    """Read the weights of `layers` and the experts `pairs`, and lay out the KV pages. OctavoError if it cannot."""
    begun_s = time.monotonic()
    torch.set_num_threads(config.worker.num_threads)
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device` = 'cuda', but torch finds no CUDA device here")
    dtype = pick_dtype(device, config.dtype)
    page_tokens = config.scheduler.page_tokens
    num_pages = pages_that_fit(weights.spec, layers, page_tokens, dtype, config.worker.kv_gib)
    _check_room(config, weights.spec, num_pages * page_tokens)
    stage = Stage.load(
        weights, layers, num_pages=num_pages, page_tokens=page_tokens, dtype=dtype, device=device, timer=timer
    )
    loaded = Loaded(weights, stage, ExpertHost(weights.spec, dtype, device), num_pages, set())
    loaded.host_experts(pairs)
    loaded.load_s = time.monotonic() - begun_s
    return loaded


def _check_room(config: OctavoConfig, spec: ModelSpec, num_tokens: int) -> None:
    wanted = max_context_tokens(config, spec)
    if num_tokens < wanted:
        raise ConfigError(
            f"`worker.kv_gib` = {config.worker.kv_gib:g} holds the KV of {num_tokens} tokens, and one context may have"
            f" {wanted}: raise it, or lower `scheduler.max_context_tokens`"
        )


def load_whole(weights: Weights, config: OctavoConfig, timer: StepTimer | None = None) -> Loaded:
    """The whole model in one stage, all its experts beside it."""
    spec = weights.spec
    pairs = [(layer, expert) for layer in range(spec.num_layers) for expert in range(spec.num_experts)]
    return load(weights, config, range(spec.num_layers), pairs, timer)


def pages_that_fit(spec: ModelSpec, layers: range, page_tokens: int, dtype: torch.dtype, kv_gib: float) -> int:
    """KV pages of one stage that fit in `kv_gib` GiB; at least one."""
    return max(1, int(kv_gib * 2**30) // kv_bytes_per_page(spec, len(layers), page_tokens, dtype))


def resident_bytes() -> int:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
