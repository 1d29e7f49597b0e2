"""What one seed stands for: a small cell, its requests, and the weather that its messages meet."""

from dataclasses import dataclass
from random import Random

from serve_app.engine.core import EngineConfig
from serve_app.engine.members import StageTable
from serve_app.engine.membership import MembershipConfig
from serve_app.engine.request import Request, SamplingParams
from serve_app.experts.layout import Layout, stage_layers
from serve_app.experts.placement import Slots, place, primaries_per_worker
from serve_app.sim.network import Weather
from serve_app.sim.toy import EOS, VOCAB

LOAD_S = 12.0  # requests come and faults strike in this time; afterwards the cell is left in peace
STEP_LIMIT_S = 4.0
STUCK_S = 15.0
DOCUMENT = [(7 * i * i + 3) % VOCAB for i in range(40)]  # what prompts have in common


@dataclass(frozen=True)
class Asked:
    """A request of a client. `cancel_s` is None where it waits to the end."""

    request: Request
    at_s: float
    cancel_s: float | None


@dataclass(frozen=True)
class Scenario:
    layout: Layout
    stages: list[range]
    num_experts: int
    slots: Slots
    tables: list[StageTable]  # the placement at full strength
    engine: EngineConfig
    members: MembershipConfig
    num_pages: tuple[int, int]  # of a worker: least, most
    step_s: float  # of one stage, on average
    weather: Weather
    asked: list[Asked]

    @property
    def serial_s(self) -> float:
        """What all requests take at most, one token after another."""
        num_tokens = sum(len(ask.request.prompt) + ask.request.sampling.max_new_tokens for ask in self.asked)
        return num_tokens * self.layout.num_stages * 1.5 * self.step_s


def draw_scenario(rng: Random) -> Scenario:
    layout = Layout(rng.randint(1, 3), rng.randint(1, 3), rng.choice((1, 1, 2)))
    stages = stage_layers(rng.randint(layout.num_stages, 2 * layout.num_stages), layout.num_stages)
    num_experts = rng.randint(2, 6)
    needed = primaries_per_worker(max(map(len, stages)), num_experts, layout.group_size)
    slots = Slots(needed + rng.randint(0, 1), rng.randint(0, 3))
    placements = [place(layers, num_experts, layout.group_size, slots) for layers in stages]
    engine = _engine_config(rng, layout)
    least = -(-engine.max_context_tokens // engine.page_tokens)
    return Scenario(
        layout,
        stages,
        num_experts,
        slots,
        [[[list(ranks) for ranks in table] for table in placement.hosts] for placement in placements],
        engine,
        MembershipConfig(stuck_s=STUCK_S, num_spares=rng.choice((0, 0, 1, 2))),
        (least, rng.randint(least, 3 * least)),
        rng.choice((0.02, 0.05, 0.1)),
        Weather(rng.choice((0.0, 0.02, 0.05)), rng.choice((0.0, 0.02, 0.1)), rng.choice((0.0, 0.0005, 0.002, 0.02))),
        [_ask(rng, i, engine) for i in range(rng.randint(4, 20))],
    )


def _engine_config(rng: Random, layout: Layout) -> EngineConfig:
    return EngineConfig(
        num_stages=layout.num_stages,
        max_context_tokens=rng.randint(12, 64),
        page_tokens=rng.choice((1, 2, 4, 8)),
        max_running=rng.randint(1, 8),
        max_step_tokens=rng.choice((3, 8, 16, 32)),
        eos_token_ids=(EOS,),
        prefix_cache=rng.random() < 0.7,
        keep_s=rng.choice((0.0, 3.0, 30.0)),
    )


def _ask(rng: Random, i: int, config: EngineConfig) -> Asked:
    own = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
    shared = DOCUMENT[: rng.choice((0, 4, 8, 16))]
    prompt = [*shared, *own][: config.max_context_tokens - 1]
    sampling = SamplingParams(
        max_new_tokens=rng.randint(1, 40),
        min_new_tokens=rng.choice((0, 0, 4)),
        seed=rng.randrange(4),
        ignore_eos=rng.random() < 0.6,
    )
    at_s = rng.uniform(0.0, LOAD_S)
    return Asked(Request(f"r{i}", prompt, sampling), at_s, at_s + rng.uniform(0, 4) if rng.random() < 0.15 else None)
