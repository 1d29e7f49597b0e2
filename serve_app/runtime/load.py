"""From weights to a stage that can run: what a worker and the in-process executor both begin with."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from serve_app.config import OctavoConfig
from serve_app.errors import CheckpointError, ConfigError
from serve_app.experts.layout import cut_heads
from serve_app.experts.placement import Pair
from serve_app.model.checkpoint import TOKENIZER
from serve_app.model.cpu import pick_dtype
from serve_app.model.grammar import Compiler, Grammars
from serve_app.model.moe import ExpertHost, Weights
from serve_app.model.spec import ModelSpec
from serve_app.model.stage import Stage, kv_bytes_per_page
from serve_app.model.timing import StepTimer
from serve_app.runtime.lasting import lasting_memory
from serve_app.runtime.settings import max_context_tokens


@dataclass
class Loaded:
    """A stage, the experts that live beside it, and where more of them come from."""

    weights: Weights
    stage: Stage
    host: ExpertHost
    hosted: set[Pair]
    grammars: Grammars = field(default_factory=Grammars.without_tokenizer)
    load_s: float = 0.0

    def host_experts(self, pairs: list[Pair], pack: bool = False) -> None:
        """Hold exactly these experts' weights: drop the others, and take the missing ones without a stall.

        They are only mapped, for `pack_next` to pack, unless they are to be packed here.
        """
        wanted = set(pairs)
        for pair in self.hosted - wanted:
            self.host.drop(*pair)
        take = self.host.load if pack else self.host.map
        with lasting_memory():
            for pair in sorted(wanted - self.hosted):
                take(self.weights, *pair)
        self.hosted = wanted

    def pack_next(self) -> bool:
        """Pack one expert that is only mapped, so that it runs faster. False where none is."""
        if not self.host.num_mapped:
            return False
        with lasting_memory():
            return self.host.pack_next()


def load(
    weights: Weights,
    config: OctavoConfig,
    layers: range,
    shard: int,
    pairs: list[Pair],
    timer: StepTimer | None = None,
    *,
    pack: bool = True,
) -> Loaded:
    """Read one shard's part of `layers` and the experts `pairs`, and lay out the KV pages. OctavoError if it cannot.

    Without `pack` the experts are mapped only, which is at once: for a seat whose streams wait.
    """
    begun_s = time.monotonic()
    torch.set_num_threads(config.worker.num_threads)
    dtype, device = pick_dtype(_device(config), config.dtype), _device(config)
    host = ExpertHost(weights.spec, dtype, device)
    loaded = Loaded(weights, load_stage(weights, config, layers, shard, timer), host, set())
    loaded.host_experts(pairs, pack=pack)
    if loaded.stage.is_last and shard == 0:  # where tokens are chosen
        loaded.grammars = load_grammars(weights)
    loaded.load_s = time.monotonic() - begun_s
    return loaded


def load_stage(
    weights: Weights, config: OctavoConfig, layers: range, shard: int, timer: StepTimer | None = None
) -> Stage:
    """One shard's part of `layers` but for the experts, with its KV pages. OctavoError if it cannot be."""
    device = _device(config)
    dtype = pick_dtype(device, config.dtype)
    page_tokens, num_shards = config.scheduler.page_tokens, config.layout.tp
    num_pages = pages_that_fit(weights.spec, layers, num_shards, shard, page_tokens, dtype, config.worker.kv_gib)
    _check_room(config, weights.spec, num_pages * page_tokens)
    with lasting_memory():
        return Stage.load(
            weights,
            layers,
            num_pages=num_pages,
            page_tokens=page_tokens,
            dtype=dtype,
            device=device,
            num_shards=num_shards,
            shard=shard,
            timer=timer,
        )


def load_grammars(weights: Weights) -> Grammars:
    """What chooses tokens by a grammar. The tokenizer's text is had now, while it is there, and read when needed."""
    try:
        text_U8 = weights.tensor(TOKENIZER)
    except (KeyError, CheckpointError):
        return Grammars.without_tokenizer()
    return Grammars(Compiler(lambda: bytes(text_U8.numpy().data).decode(), weights.spec.eos_token_ids))


def _device(config: OctavoConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device` = 'cuda', but torch finds no CUDA device here")
    return torch.device(config.device)


def _check_room(config: OctavoConfig, spec: ModelSpec, num_tokens: int) -> None:
    wanted = max_context_tokens(config, spec)
    if num_tokens < wanted:
        raise ConfigError(
            f"`worker.kv_gib` = {config.worker.kv_gib:g} holds the KV of {num_tokens} tokens, and one context may have"
            f" {wanted}: raise it, or lower `scheduler.max_context_tokens`"
        )


def load_experts(weights: Weights, config: OctavoConfig) -> ExpertHost:
    """All experts of the model. OctavoError if it cannot."""
    spec, device = weights.spec, _device(config)
    host = ExpertHost(spec, pick_dtype(device, config.dtype), device)
    with lasting_memory():
        for layer in range(spec.num_layers):
            for expert in range(spec.num_experts):
                host.load(weights, layer, expert)
    return host


def pages_that_fit(
    spec: ModelSpec,
    layers: range,
    num_shards: int,
    shard: int,
    page_tokens: int,
    dtype: torch.dtype,
    kv_gib: float,
) -> int:
    """KV pages of one shard of a stage that fit in `kv_gib` GiB; at least one."""
    num_kv_heads = len(cut_heads(spec.num_heads, spec.num_kv_heads, num_shards, shard).kv_heads)
    page_bytes = kv_bytes_per_page(spec, len(layers), num_kv_heads, page_tokens, dtype)
    return max(1, int(kv_gib * 2**30) // page_bytes)


def resident_bytes() -> int:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
