"""The cost model of memory counts what a worker loads, byte by byte, and what it takes to run is within reach of it."""

import multiprocessing
import re
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import OctavoConfig
from serve_app.engine.request import Request, SamplingParams
from serve_app.experts.layout import Layout, Seat, stage_layers
from serve_app.experts.placement import Slots, place, primaries_per_worker
from serve_app.model.cpu import cpu_has_bf16
from serve_app.model.layers import padded_rows
from serve_app.model.random_weights import random_checkpoint
from serve_app.model.spec import ModelSpec, RopeSpec
from serve_app.plan.memory import num_row_sizes, worker_memory
from serve_app.runtime.load import load
from serve_app.runtime.local import LocalEngine

PAGE_TOKENS = 16
KV_GIB = 0.003
LIMITS = {"page_tokens": PAGE_TOKENS, "kv_gib": KV_GIB, "max_step_tokens": 64, "max_running": 8}

PLAIN = ModelSpec(
    family="qwen3_moe",
    vocab_size=101,
    hidden_size=48,
    num_layers=5,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    num_experts=7,
    top_k=2,
    expert_size=40,
    norm_topk=True,
    max_positions=400,
    norm_eps=1e-6,
    rope=RopeSpec(),
    tie_embeddings=False,
    qk_norm="head",
    dtype="float32",
)
SPECS = {
    "qwen3_moe": PLAIN,
    "dense": replace(PLAIN, family="llama", num_experts=1, top_k=1, qk_norm="none", tie_embeddings=True),
    "olmoe": replace(PLAIN, family="olmoe", qk_norm="full"),
    "qwen2_moe": replace(PLAIN, family="qwen2_moe", qk_norm="none", shared_size=24, qkv_bias=True),
    "phimoe": replace(
        PLAIN,
        family="phimoe",
        qk_norm="none",
        norm="layer",
        qkv_bias=True,
        output_bias=True,
        head_bias=True,
        mixer_jitter=0.1,
    ),
}


def config_of(layout, dtype="float32", kv_gib=KV_GIB, **scheduler):
    return OctavoConfig.model_validate(
        {
            "model": "random",
            "dtype": dtype,
            "layout": {"pp": layout.num_stages, "dp": layout.num_replicas, "tp": layout.num_shards},
            "worker": {"kv_gib": kv_gib},
            "scheduler": {"page_tokens": PAGE_TOKENS, "max_context_tokens": 64} | scheduler,
        }
    )


def tensors_in(thing, seen):
    """Every tensor that hangs on an object, each once."""
    if id(thing) in seen:
        return
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_in(value, seen)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from tensors_in(value, seen)
    elif type(thing).__module__.startswith("serve_app."):
        yield from tensors_in(vars(thing), seen)


def held_bytes(loaded):
    """Of all that a worker has loaded; what is held in two ways at one place counts once."""
    tensors = tensors_in([loaded.stage, loaded.host], {})
    return sum({(tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in tensors}.values())


def loaded_bytes(memory):
    return memory.dense_bytes + memory.experts_bytes + memory.vocabulary_bytes + memory.tables_bytes + memory.kv_bytes


@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(2, 2), Layout(3, 1, 4), Layout(2, 1, 3)], ids=str)
@pytest.mark.parametrize("family", SPECS)
def test_what_is_loaded_is_predicted_to_the_byte(family, layout):
    spec = SPECS[family]
    weights = random_checkpoint(spec)
    stages = stage_layers(spec.num_layers, layout.num_stages)
    for seat in layout.seats():
        layers = stages[seat.stage]
        placement = place(layers, spec.num_experts, layout.group_size)
        pairs = placement.held(layout.group_rank(seat))
        loaded = load(weights, config_of(layout), layers, seat.shard, pairs)
        slots = Slots(max(1, len(pairs)), 0)
        memory = worker_memory(spec, layout, stages, seat, slots, dtype_bytes=4, **LIMITS)
        empty_bytes = 0 if pairs else memory.experts_bytes
        assert held_bytes(loaded) == loaded_bytes(memory) - empty_bytes


@pytest.mark.skipif(not cpu_has_bf16(), reason="weights are packed where the CPU multiplies bf16 natively")
def test_a_head_that_is_packed_is_held_as_the_checkpoint_has_it_too():
    layout, stages = Layout(1, 1), [range(PLAIN.num_layers)]
    pairs = [(layer, expert) for layer in stages[0] for expert in range(PLAIN.num_experts)]
    loaded = load(random_checkpoint(PLAIN), config_of(layout, "bfloat16"), stages[0], 0, pairs)
    memory = worker_memory(PLAIN, layout, stages, Seat(0, 0, 0), Slots(len(pairs), 0), dtype_bytes=2, **LIMITS)
    assert loaded.stage.head.is_packed
    words = PLAIN.vocab_size * PLAIN.hidden_size
    assert memory.vocabulary_bytes == words * (2 + 2 + 4)  # embedding, head, and head in the checkpoint's fp32
    assert loaded.stage.embed_VD.nbytes + loaded.stage.head_VD.nbytes == words * (2 + 4)
    assert memory.kv_bytes == loaded.stage.kv._k.nbytes + loaded.stage.kv._v.nbytes


@given(st.integers(1, 3000))
def test_the_numbers_of_rows_that_have_kernels_are_those_that_linears_use(max_rows):
    assert num_row_sizes(max_rows) == len({padded_rows(rows, 512) for rows in range(1, max_rows + 1)})


@st.composite
def workers(draw):
    layout = Layout(draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 6)))
    spec = SPECS[draw(st.sampled_from(sorted(SPECS)))]
    stages = stage_layers(spec.num_layers, layout.num_stages)
    needed = primaries_per_worker(max(map(len, stages)), spec.num_experts, layout.group_size)
    slots = Slots(needed, draw(st.integers(0, 3)))
    return spec, layout, stages, draw(st.sampled_from(layout.seats())), slots


@given(workers(), st.sampled_from([2, 4]))
def test_larger_limits_never_take_less(worker, dtype_bytes):
    few = worker_memory(*worker, dtype_bytes=dtype_bytes, **LIMITS)
    for limit, larger in {"kv_gib": 0.01, "max_step_tokens": 512, "max_running": 64}.items():
        more = worker_memory(*worker, dtype_bytes=dtype_bytes, **(LIMITS | {limit: larger}))
        assert all(a <= b for a, b in zip(astuple(few), astuple(more), strict=True))
    assert few.total_bytes == sum(astuple(few))
    assert few.kv_bytes <= KV_GIB * 2**30


@given(workers())
def test_standby_slots_cost_an_expert_each_until_the_stage_has_no_more(worker):
    spec, _, stages, seat, slots = worker
    num_pairs = len(stages[seat.stage]) * spec.num_experts
    expert_bytes = 3 * spec.hidden_size * spec.expert_size * 2
    memory = worker_memory(*worker, dtype_bytes=2, **LIMITS)
    assert memory.experts_bytes == expert_bytes * min(num_pairs, slots.primary + slots.standby)


# -- a real process -------------------------------------------------------------------------------------------------

WIDE = replace(PLAIN, vocab_size=4096, hidden_size=512, num_heads=8, num_kv_heads=4, head_dim=64, expert_size=1024)
WIDE_LIMITS = {"page_tokens": PAGE_TOKENS, "kv_gib": 0.1, "max_step_tokens": 256, "max_running": 64}


def status_bytes(name):
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024


def load_and_run(answers):
    """Bytes that a process of its own grows by after its imports: by loading, and at most."""
    at_rest_bytes = status_bytes("VmRSS")
    limits = {"max_step_tokens": WIDE_LIMITS["max_step_tokens"], "max_running": WIDE_LIMITS["max_running"]}
    config = config_of(Layout(1, 1), "bfloat16", WIDE_LIMITS["kv_gib"], **limits)
    engine = LocalEngine.load(random_checkpoint(WIDE), config)
    loaded_at_bytes = status_bytes("VmRSS")
    sampling = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)
    prompts = [[(7 * i + j) % WIDE.vocab_size for j in range(8 + i)] for i in range(48)]
    for _ in engine.generate([Request(f"r{i}", prompt, sampling) for i, prompt in enumerate(prompts)]):
        pass
    answers.put((loaded_at_bytes - at_rest_bytes, status_bytes("VmHWM") - at_rest_bytes))


@pytest.mark.skipif(not cpu_has_bf16(), reason="kernels are counted for CPUs that multiply bf16 natively")
def test_a_process_grows_as_predicted():
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=load_and_run, args=(answers,))
    process.start()
    by_loading_bytes, at_most_bytes = answers.get(timeout=120)
    process.join()
    layers = range(WIDE.num_layers)
    slots = Slots(len(layers) * WIDE.num_experts, 0)
    memory = worker_memory(WIDE, Layout(1, 1), [layers], Seat(0, 0, 0), slots, dtype_bytes=2, **WIDE_LIMITS)
    assert by_loading_bytes == pytest.approx(loaded_bytes(memory), rel=0.15)  # no holes between the weights
    assert at_most_bytes == pytest.approx(memory.total_bytes - memory.process_bytes, rel=0.15)
