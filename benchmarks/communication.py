"""Bytes that a cell sends for a token in a layer: counted on the mesh, and beside them the least that would do.

The cell is whole: engine, router and workers, threads of this process, over the real mesh. Models have the sizes of
the real ones, but narrow experts, and random weights: the bytes do not depend on either. A step's plan and its routing
(found by running the plans again in one process) say what has to be sent; that and what was sent must agree.

Usage, in the root of the project: python -m benchmarks.communication
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from serve_app.config import OctavoConfig, ResilienceConfig, parse_config
from serve_app.engine.core import EngineCore
from serve_app.engine.members import StageTable
from serve_app.engine.plan import Command, Event, Plan, Run
from serve_app.engine.request import Request, SamplingParams
from serve_app.experts.layout import cut
from serve_app.fetch.reference import CONFIG as REFERENCE
from serve_app.model.batch import Batch
from serve_app.model.cpu import pick_dtype
from serve_app.model.moe import ExpertHost, LocalExperts, Weights, group_by_expert
from serve_app.model.random_weights import random_checkpoint
from serve_app.model.spec import ModelSpec
from serve_app.model.spec import parse_config as parse_model
from serve_app.runtime.dispatch import deal
from serve_app.runtime.load import load_experts, load_stage
from serve_app.runtime.mesh import Traffic
from serve_app.runtime.router import Registry
from serve_app.runtime.threads import ThreadGroup
from tests.runtime.cell import ThreadedCell

CPU = torch.device("cpu")
FP32_BYTES = 4

# What frames are sent for -> the message that carries them.
CARRIERS = {
    "gather": "ShardPart",
    "scatter": "ShardPart",
    "norms": "ShardPart",
    "out": "ExpertCall",
    "home": "ExpertReply",
    "stages": "Hidden",
    "embedding": "ShardPart",
    "sampled": "ShardPart",
    "logits": "ShardPart",
}
IN_LAYERS = ("gather", "scatter", "norms", "out", "home", "stages")
AT_ENDS = ("embedding", "sampled", "logits")
STEP_MESSAGES = {*CARRIERS.values(), "Plan", "StepDone"}


# -- what a step has to send ----------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """What the formulas need to know of a model and its layout."""

    spec: ModelSpec
    num_stages: int  # P
    num_shards: int  # T
    item_bytes: int  # b
    tables: StageTable  # of all layers

    @property
    def row_bytes(self) -> int:
        return self.spec.hidden_size * self.item_bytes


Routing = list[dict[int, Tensor]]  # [shard][layer] -> ids_SK of the shard's tokens; a shard without tokens has none


def due_bytes(cell: Cut, plan: Plan, routing: Routing) -> Counter[str]:
    """Bytes of all frames of one step, by what they are for."""
    num_rows, _ = num_expert_rows(cell, plan, routing)
    return _bytes_of(cell, plan, num_rows, FP32_BYTES, cell.num_shards)


def least_bytes(cell: Cut, plan: Plan, routing: Routing) -> Counter[str]:
    """The fewest with which the same cut of the model could do: see docs/architecture.md, "What is sent"."""
    _, num_hosts = num_expert_rows(cell, plan, routing)
    return _bytes_of(cell, plan, num_hosts, cell.item_bytes, min(2, cell.num_shards))


def account(
    cell: Cut, plans: Iterable[Plan], routing: dict[tuple[int, int], Routing]
) -> tuple[Counter[str], Counter[str]]:
    """Sums of `due_bytes` and `least_bytes` over steps. `routing`: by (replica, step)."""
    due, least = Counter[str](), Counter[str]()
    for plan in plans:
        due.update(due_bytes(cell, plan, routing[plan.replica, plan.step]))
        least.update(least_bytes(cell, plan, routing[plan.replica, plan.step]))
    return due, least


def _bytes_of(cell: Cut, plan: Plan, num_expert_rows: int, wide_bytes: int, norm_copies: int) -> Counter[str]:
    """`wide_bytes`: of a number of the residual stream or the logits. `norm_copies`: a token's sums to each other."""
    spec, num_tokens, num_sampled = cell.spec, _num_tokens(plan), _num_sampled(plan)
    num_others = cell.num_shards - 1
    rows = spec.num_layers * num_tokens * num_others * cell.row_bytes
    norms = spec.num_layers * num_tokens * num_others * norm_copies * 2 * FP32_BYTES
    foreign_columns = spec.vocab_size - len(cut(spec.vocab_size, cell.num_shards, 0))
    return Counter(
        gather=rows,
        scatter=rows,
        norms=norms if spec.qk_norm == "full" else 0,
        out=num_expert_rows * cell.row_bytes,
        home=num_expert_rows * cell.row_bytes,
        stages=(cell.num_stages - 1) * num_tokens * spec.hidden_size * wide_bytes,
        embedding=_num_foreign_embeddings(cell, plan) * cell.row_bytes,
        sampled=num_sampled * num_others * cell.row_bytes,
        logits=num_sampled * foreign_columns * wide_bytes,
    )


def _num_tokens(plan: Plan) -> int:
    return sum(len(part.tokens) for part in plan.slices)


def _num_sampled(plan: Plan) -> int:
    return sum(part.sample is not None for part in plan.slices)


def _num_foreign_embeddings(cell: Cut, plan: Plan) -> int:
    """Tokens whose embedding lives on another shard than they do."""
    tokens = [token for part in plan.slices for token in part.tokens]
    num_shards, vocab_size = cell.num_shards, cell.spec.vocab_size
    at_home = sum(
        tokens[row] in cut(vocab_size, num_shards, shard)
        for shard in range(num_shards)
        for row in cut(len(tokens), num_shards, shard)
    )
    return len(tokens) - at_home


def num_expert_rows(cell: Cut, plan: Plan, routing: Routing) -> tuple[int, int]:
    """(rows that leave their home, hosts that a token leaves its home for), summed over tokens and layers."""
    num_rows = num_hosts = 0
    for shard, by_layer in enumerate(routing):
        home = plan.replica * cell.num_shards + shard
        for layer, ids_SK in by_layer.items():
            for hosts in _hosts(ids_SK, cell.tables[layer], home):
                away = [host for host in hosts if host != home]
                num_rows += len(away)
                num_hosts += len(set(away))
    return num_rows, num_hosts


def _hosts(ids_SK: Tensor, table: list[list[int]], caller: int) -> list[list[int]]:
    """Which rank runs each row."""
    order_N, experts, counts = group_by_expert(ids_SK)
    dealt = [
        host
        for expert, count in zip(experts, counts, strict=True)
        for host, part in deal(table[expert], caller, count)
        for _ in part
    ]
    hosts_N = torch.empty_like(order_N)
    hosts_N[order_N] = torch.tensor(dealt)
    by_token: list[list[int]] = hosts_N.view(ids_SK.shape).tolist()
    return by_token


def expected_rows(num_experts: int, top_k: int, num_workers: int) -> tuple[float, float]:
    """(rows, hosts) away from home per token and layer, where all sets of K experts are alike and all workers too."""
    own = num_experts // num_workers
    missed = comb(num_experts - own, top_k) / comb(num_experts, top_k)
    return top_k * (num_workers - 1) / num_workers, (num_workers - 1) * (1 - missed)


# -- a cell that is watched -----------------------------------------------------------------------------------------


class Phase(NamedTuple):
    """Some steps of a cell, and what was sent for them."""

    plans: list[Plan]
    sent: Traffic


class _Watched(EngineCore):
    """A core that remembers its plans."""

    plans: list[Plan]

    def on(self, event: Event, now: float) -> list[Command]:
        commands = super().on(event, now)
        self.plans += [command.plan for command in commands if isinstance(command, Run)]
        return commands


def run(
    weights: Weights, config: OctavoConfig, batches: Iterable[Sequence[Request]], registry: Registry | None = None
) -> tuple[Cut, list[Phase]]:
    """Run one batch of requests after the other in one cell. Names may come again: nothing is kept of a batch."""
    config = config.model_copy(update={"resilience": ResilienceConfig(resume_s=0.0)})
    cell = ThreadedCell(weights, config, registry)
    core = cell.core = cell.cell.core = _Watched(cell.core.config)
    core.plans = []
    phases = []
    with cell:
        for requests in batches:
            before, first = _sent(cell), len(core.plans)
            for request in requests:
                cell.submit(request)
            cell.collect(len(requests))
            phases.append(Phase(core.plans[first:], _between(before, _sent(cell))))
    tables = [table for stage in cell.registry.tables() for table in stage]
    item_bytes = pick_dtype(CPU, config.dtype).itemsize
    return Cut(weights.spec, config.layout.pp, config.layout.tp, item_bytes, tables), phases


def _sent(cell: ThreadedCell) -> Traffic:
    """By all workers and the engine: headers of steps, and all frames."""
    header_bytes: Counter[str] = Counter()
    frame_bytes: Counter[str] = Counter()
    for mesh in (cell.engine_mesh, *(worker._mesh for worker in cell.workers.values())):
        sent = mesh.sent()
        header_bytes.update(sent.header_bytes)
        frame_bytes.update(sent.frame_bytes)
    of_steps = {kind: num for kind, num in header_bytes.items() if kind in STEP_MESSAGES}
    return Traffic(Counter(of_steps), frame_bytes)


def _between(before: Traffic, after: Traffic) -> Traffic:
    return Traffic(after.header_bytes - before.header_bytes, after.frame_bytes - before.frame_bytes)


class _Recorder:
    """`Experts` of one shard in one step: all of them here, the routing remembered."""

    def __init__(self, host: ExpertHost) -> None:
        self._run = LocalExperts(host)
        self.ids: dict[int, Tensor] = {}

    def __call__(self, layer: int, x_SD: Tensor, ids_SK: Tensor) -> Tensor:
        self.ids[layer] = ids_SK
        return self._run(layer, x_SD, ids_SK)


def replay(weights: Weights, config: OctavoConfig, plans: Sequence[Plan]) -> dict[tuple[int, int], Routing]:
    """The routing of each (replica, step): in bf16 that of the cell, bit for bit, for shards are as many."""
    layout, layers = config.layout, range(weights.spec.num_layers)
    worker = config.worker.model_copy(update={"kv_gib": config.worker.kv_gib * layout.pp})  # one stage has all layers
    whole = config.model_copy(update={"worker": worker})
    stages = [load_stage(weights, whole, layers, shard) for shard in range(layout.tp)]
    host, group = load_experts(weights, whole), ThreadGroup(layout.tp)

    def routing_of(plan: Plan) -> Routing:
        batch = Batch.from_plan(plan, config.scheduler.page_tokens, CPU)
        recorders = [_Recorder(host) for _ in stages]
        group.run(lambda i: stages[i].forward(batch, None, recorders[i], group.shards[i]))
        return [recorder.ids for recorder in recorders]

    # Replicas one after the other: they share the pages here.
    in_turn = sorted(plans, key=lambda plan: (plan.replica, plan.step))
    return {(plan.replica, plan.step): routing_of(plan) for plan in in_turn}


def by_carrier(num_bytes: Counter[str]) -> Counter[str]:
    total: Counter[str] = Counter()
    for purpose, num in num_bytes.items():
        total[CARRIERS[purpose]] += num
    return total


# -- the table ------------------------------------------------------------------------------------------------------

REFERENCE_SPEC = replace(parse_model(REFERENCE), expert_size=32)
DEMO_SPEC = replace(
    REFERENCE_SPEC,
    family="mixtral",
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    num_experts=8,
    qk_norm="none",
)
CASES = [
    ("reference", REFERENCE_SPEC, {"tp": 4}, 0),
    ("reference", REFERENCE_SPEC, {"pp": 4}, 0),
    ("reference", REFERENCE_SPEC, {"dp": 8}, 0),
    ("reference", REFERENCE_SPEC, {"tp": 4, "pp": 4, "dp": 2}, 0),
    ("reference", REFERENCE_SPEC, {"tp": 4, "pp": 4, "dp": 2}, 2),
    ("demo", DEMO_SPEC, {"pp": 2, "dp": 2}, 0),
]
NUM_PROMPTS, PROMPT_TOKENS = 8, 256
NUM_DECODING, OUTPUT_TOKENS = 64, 4


class _Remembered:
    """Random weights, each made once for all workers."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.tensor = functools.cache(random_checkpoint(spec).tensor)


def _config(layout: dict[str, int], standby_slots: int) -> OctavoConfig:
    return parse_config(
        {
            "dtype": "bfloat16",
            "layout": layout,
            "worker": {"kv_gib": 0.25, "standby_slots": standby_slots},
            "scheduler": {"max_context_tokens": PROMPT_TOKENS + OUTPUT_TOKENS, "prefix_cache": False},
        }
    )


def _requests(name: str, num: int, prompt_tokens: int, output_tokens: int, vocab_size: int) -> list[Request]:
    draw = torch.Generator().manual_seed(prompt_tokens)
    prompts = torch.randint(vocab_size, (num, prompt_tokens), generator=draw).tolist()
    params = SamplingParams(max_new_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    return [Request(f"{name}{i}", prompt, params) for i, prompt in enumerate(prompts)]


def measure(spec: ModelSpec, layout: dict[str, int], standby_slots: int) -> str:
    """The cells of a row of the table."""
    weights, config = _Remembered(spec), _config(layout, standby_slots)
    prefill = _requests("p", NUM_PROMPTS, PROMPT_TOKENS, 1, spec.vocab_size)
    decode = _requests("d", NUM_DECODING, 1, OUTPUT_TOKENS, spec.vocab_size)
    cell, phases = run(weights, config, [prefill, decode])
    routing = replay(weights, config, [plan for phase in phases for plan in phase.plans])
    sums = [account(cell, phase.plans, routing) for phase in phases]
    for phase, (due, _) in zip(phases, sums, strict=True):
        assert by_carrier(due) == phase.sent.frame_bytes, "what was sent is not what had to be"
    due, least = (sum(counts, Counter()) for counts in zip(*sums, strict=True))
    num_tokens = [sum(map(_num_tokens, phase.plans)) for phase in phases]
    headers = [phase.sent.header_bytes.total() / num for phase, num in zip(phases, num_tokens, strict=True)]
    ends = [sum(of[p] for p in AT_ENDS) / num for (of, _), num in zip(sums, num_tokens, strict=True)]
    return " | ".join(
        [
            *_shares(due, least, sum(num_tokens) * spec.num_layers),
            ", ".join(f"{num / spec.num_layers:,.0f}" for num in headers),
            ", ".join(f"{num:,.0f}" for num in ends),
        ]
    )


def _shares(due: Counter[str], least: Counter[str], num_places: int) -> list[str]:
    """Sent / least of each part of a layer, and the ratio of the sums. `num_places`: tokens x layers."""
    shares = []
    for part in (("gather", "scatter", "norms"), ("out", "home"), ("stages",)):
        sent, needed = (sum(num[purpose] for purpose in part) / num_places for num in (due, least))
        shares.append(f"{sent:,.0f} / {needed:,.0f}" if sent else "-")
    return [*shares, f"{sum(due[p] for p in IN_LAYERS) / sum(least[p] for p in IN_LAYERS):.2f}"]


def main() -> None:
    print(f"prefill: {NUM_PROMPTS} prompts of {PROMPT_TOKENS} tokens; decode: {NUM_DECODING} sequences")
    print("| model and layout | attention | expert rows | stages | sent / least | headers | ends |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model, spec, layout, standby_slots in CASES:
        name = " ".join([model, *(f"{key.upper()} {num}" for key, num in layout.items())])
        name += f", {standby_slots} standby slots" if standby_slots else ""
        print(f"| {name} | {measure(spec, layout, standby_slots)} |", flush=True)
    for name, sizes in (("demo, 2 workers", (8, 2, 2)), ("reference, 8 workers", (16, 2, 8))):
        rows, hosts = expected_rows(*sizes)
        print(f"expected, {name}: {rows:.3f} rows, {hosts:.3f} hosts away from home per token and layer")


if __name__ == "__main__":
    main()
