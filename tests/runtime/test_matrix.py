"""Any layout is the same function: greedy tokens in fp32 over TP x PP x DP, and bf16 logits over placements."""

import random
from itertools import product

import pytest
import torch

from serve_app.engine.request import Request, SamplingParams
from serve_app.experts.layout import Layout, stage_layers
from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import silent
from serve_app.model.checkpoint import Checkpoint
from serve_app.model.tokenizer import Tokenizer
from serve_app.runtime import worker as worker_module
from serve_app.runtime.local import LocalEngine
from tests.cluster.prompts import QUESTIONS as PROMPTS
from tests.model.families import make_tiny
from tests.runtime.cell import ThreadedCell, collect_local
from tests.runtime.test_cell import Shuffled, config_of, requests_of

LAYOUTS = list(product((1, 2, 4), (1, 2, 4), (1, 2)))  # TP, PP, DP
TINY = ("mixtral", "granitemoe")


@pytest.fixture(scope="module", params=TINY)
def tiny(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny(request.param, folder, num_hidden_layers=5)
    return Checkpoint.open(folder)


def answers(weights, config, requests):
    with ThreadedCell(weights, config) as cell:
        for request in requests:
            cell.submit(request)
        return cell.collect(len(requests))


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp", "dp"), LAYOUTS)
def test_a_tiny_model_answers_the_same_in_fp32_whatever_the_layout(tiny, tp, pp, dp):
    requests = requests_of(tiny, 10, seed=1)
    expected = collect_local(LocalEngine.load(tiny, config_of(1, 1, dtype="float32")), requests)
    assert answers(tiny, config_of(pp, dp, tp, dtype="float32"), requests) == expected


@pytest.fixture(scope="module")
def demo():
    """(weights, requests, answers of one process) of the demo model: nine heads, which four shards do not divide."""
    folder = resolve("demo", silent, fetch=True)
    weights, tokenizer = Checkpoint.open(folder), Tokenizer.load(folder)
    sampling = SamplingParams(max_new_tokens=16, temperature=0.0, ignore_eos=True)
    requests = [
        Request(f"r{i}", tokenizer.encode_chat([{"role": "user", "content": text}]), sampling)
        for i, text in enumerate(PROMPTS[:6])
    ]
    return weights, requests, collect_local(LocalEngine.load(weights, demo_config(1, 1, 1)), requests)


def demo_config(tp, pp, dp):
    config = config_of(pp, dp, tp, dtype="float32", max_context_tokens=512, max_step_tokens=256)
    return config.model_copy(update={"worker": config.worker.model_copy(update={"kv_gib": 0.1})})


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp", "dp"), LAYOUTS)
def test_the_demo_answers_the_same_in_fp32_whatever_the_layout(demo, tp, pp, dp):
    weights, requests, expected = demo
    assert answers(weights, demo_config(tp, pp, dp), requests) == expected


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_placement_at_random_changes_no_bit_of_the_logits_in_bf16(family, tmp_path, monkeypatch):
    make_tiny(family, tmp_path)
    weights = Checkpoint.open(tmp_path)
    sampling = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    draw = random.Random(1)
    request = Request("r", [draw.randrange(3, 500) for _ in range(70)], sampling)
    config = config_of(2, 2, 2, max_step_tokens=200)
    logits = []

    def record(output, samples, grammars, sample=worker_module.sample):
        logits.append(output.clone())
        return sample(output, samples, grammars)

    monkeypatch.setattr(worker_module, "sample", record)
    runs = []
    for seed in (None, 1, 2, 3):
        logits.clear()
        layout = Layout(2, 2, 2)
        registry = None
        if seed is not None:
            registry = Shuffled(layout, stage_layers(weights.spec.num_layers, 2), weights.spec.num_experts, seed)
        with ThreadedCell(weights, config, registry) as cell:
            cell.submit(request)
            cell.collect(1)
        runs.append(torch.cat(logits))
    assert len(runs[0]) == 12, "a step was not recorded: the test would compare nothing"
    assert all(torch.equal(runs[0], other) for other in runs[1:])
