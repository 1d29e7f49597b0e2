"""A cell of many workers emits what one process emits. The workers are threads here; Ray comes in tests/cluster."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import OctavoConfig
from serve_app.engine.request import Request, SamplingParams
from serve_app.experts.layout import Layout, Seat, stage_layers
from serve_app.model.checkpoint import Checkpoint
from serve_app.runtime.dispatch import MIN_SPLIT_ROWS, deal
from serve_app.runtime.local import LocalEngine
from serve_app.runtime.router import Registry
from tests.model.families import make_tiny
from tests.runtime.cell import ThreadedCell, collect_local


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def weights(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny(request.param, folder)
    return Checkpoint.open(folder)


def config_of(pp, dp, tp=1, dtype="bfloat16", standby_slots=0, **scheduler):
    return OctavoConfig.model_validate(
        {
            "model": "tiny",
            "dtype": dtype,
            "layout": {"pp": pp, "dp": dp, "tp": tp},
            "worker": {"kv_gib": 0.01, "standby_slots": standby_slots},
            "scheduler": {"page_tokens": 16, "max_step_tokens": 48} | scheduler,
        }
    )


def requests_of(weights, num, seed, temperature=0.0, max_new_tokens=24):
    draw = random.Random(seed)
    vocab_size = weights.spec.vocab_size
    return [
        Request(
            f"r{i}",
            [draw.randrange(vocab_size) for _ in range(draw.randrange(1, 90))],
            SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=i, ignore_eos=True),
        )
        for i in range(num)
    ]


@pytest.mark.parametrize(
    ("pp", "dp", "tp", "temperature"),
    [(1, 1, 1, 0.8), (3, 1, 1, 0.0), (1, 2, 1, 0.8), (2, 3, 1, 0.0), (1, 1, 2, 0.8), (2, 2, 3, 0.0), (2, 2, 3, 0.8)],
)
def test_any_layout_emits_in_bf16_what_one_process_with_as_many_shards_does(weights, pp, dp, tp, temperature):
    requests = requests_of(weights, 12, seed=pp * 10 + dp, temperature=temperature)
    expected = collect_local(LocalEngine.load(weights, config_of(1, 1, tp)), requests)
    with ThreadedCell(weights, config_of(pp, dp, tp)) as cell:
        for request in requests:
            cell.submit(request)
        assert cell.collect(len(requests)) == expected
        assert cell.idle_stats().kv_usage == 0
        cell.core.check_integrity()


class Shuffled(Registry):
    """Experts live anywhere, some in several places: no balance, some workers host none of a layer."""

    def __init__(self, layout, stages, num_experts, seed):
        super().__init__(layout, stages, num_experts, None)
        self._draw = random.Random(seed)
        ranks = range(layout.group_size)
        self._tables = [
            [[self._draw.sample(ranks, self._draw.randint(1, 3)) for _ in range(num_experts)] for _ in layers]
            for layers in stages
        ]

    def tables(self):
        return self._tables


@pytest.mark.parametrize("seed", range(3))
def test_placement_and_copies_change_no_token(weights, seed):
    config = config_of(2, 2, 2, max_step_tokens=200)  # steps wide enough that copies share an expert's rows
    layout, spec = Layout(2, 2, 2), weights.spec
    registry = Shuffled(layout, stage_layers(spec.num_layers, 2), spec.num_experts, seed)
    requests = requests_of(weights, 8, seed=seed, temperature=0.7)
    expected = collect_local(LocalEngine.load(weights, config_of(1, 1, 2)), requests)
    with ThreadedCell(weights, config, registry) as cell:
        for request in requests:
            cell.submit(request)
        assert cell.collect(len(requests)) == expected


@given(st.lists(st.integers(0, 15), min_size=1, max_size=5, unique=True), st.integers(0, 15), st.integers(1, 500))
def test_copies_share_an_expert_s_rows_evenly_each_row_once(hosts, caller, num_rows):
    dealt = deal(hosts, caller, num_rows)
    assert [row for _, part in dealt for row in part] == list(range(num_rows))
    assert len({rank for rank, _ in dealt}) == len(dealt)
    assert len(dealt) == 1 or min(len(part) for _, part in dealt) >= MIN_SPLIT_ROWS
    assert caller not in hosts or dealt[0][0] == caller


def test_a_new_epoch_in_the_middle_changes_no_token(weights):
    requests = requests_of(weights, 8, seed=5, temperature=0.7, max_new_tokens=40)
    expected = collect_local(LocalEngine.load(weights, config_of(1, 1)), requests)
    with ThreadedCell(weights, config_of(2, 2)) as cell:
        for request in requests:
            cell.submit(request)
        emissions = cell.emissions()
        early = [next(emissions) for _ in range(30)]
        lost = Seat(1, 0, 0)
        cell.lose(lost)
        tokens = {}
        num_finished = 0
        for emission in [*early]:
            tokens.setdefault(emission.rid, []).extend(emission.tokens)
            num_finished += emission.finish is not None
        while num_finished < len(requests):
            emission = next(emissions)
            assert emission.first == len(tokens.setdefault(emission.rid, []))
            tokens[emission.rid].extend(emission.tokens)
            num_finished += emission.finish is not None
        assert tokens == expected[0]
        assert cell.core.epoch >= 2, "the second epoch never began: the test tested nothing"
        assert cell.idle_stats().kv_usage == 0


def test_cancelled_requests_free_their_pages(weights):
    requests = requests_of(weights, 10, seed=9, max_new_tokens=400)
    with ThreadedCell(weights, config_of(2, 2)) as cell:
        for request in requests:
            cell.submit(request)
        emissions = cell.emissions()
        for _ in range(20):
            next(emissions)
        for request in requests:
            cell.cancel(request.rid)
        finishes = []
        while len(finishes) < len(requests):
            if (finish := next(emissions).finish) is not None:
                finishes.append(finish)
        assert finishes == ["abort"] * len(requests)
        assert cell.idle_stats().kv_usage == 0
        cell.core.check_integrity()
