"""The gate, the grouping of rows by expert, the experts and their combination, each against the plain formula."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from serve_app.model.cpu import can_pack
from serve_app.model.layers import Linear
from serve_app.model.moe import ExpertHost, LocalExperts, SharedExpert, combine, group_by_expert, route
from serve_app.model.random_weights import random_checkpoint
from tests.model.driver import CPU
from tests.model.test_bitwise import MOE


def gate_of(weight):
    return Linear(weight, None, torch.float32, CPU)


def test_the_gate_takes_the_likeliest_experts_and_rescales_them():
    spec = replace(MOE, num_experts=4, top_k=2)
    gate = gate_of(torch.eye(4))
    x = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 0.0, 4.0]])
    ids, weights = route(x, gate, spec)
    probs = x.softmax(-1)
    assert ids.tolist() == [[1, 3], [0, 3]]
    torch.testing.assert_close(weights, probs.gather(1, ids) / probs.gather(1, ids).sum(-1, keepdim=True))
    _, raw = route(x, gate, replace(spec, norm_topk=False))
    torch.testing.assert_close(raw, probs.gather(1, ids))


def test_between_equal_experts_the_lower_id_wins():
    spec = replace(MOE, num_experts=64, top_k=5)
    ids, _ = route(torch.ones(3, 8), gate_of(torch.zeros(64, 8)), spec)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3, 2.0])
def test_sparse_mixer_routes_as_transformers_does(jitter):
    spec = replace(MOE, num_experts=8, top_k=2, norm_topk=False, mixer_jitter=jitter)
    scores = torch.randn(500, 8, generator=torch.Generator().manual_seed(3))
    scores[::3] -= 4.0  # all negative
    scores[::5, 2] = scores[::5, 6]  # equals
    scores[7] = 0.0
    ids, weights = route(scores, gate_of(torch.eye(8)), spec)
    expected_weights, expected_ids = sparsemixer(scores, jitter, training=False)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=0)


def test_a_row_is_routed_the_same_whatever_the_batch():
    for spec in (MOE, replace(MOE, mixer_jitter=0.1)):
        gate = Linear(torch.randn(8, 192, generator=torch.Generator().manual_seed(4)), None, torch.bfloat16, CPU)
        x = torch.randn(70, 192, generator=torch.Generator().manual_seed(5)).bfloat16()
        ids, weights = route(x, gate, spec)
        for begin, end in ((0, 1), (3, 20), (69, 70), (11, 70)):
            own_ids, own_weights = route(x[begin:end], gate, spec)
            assert torch.equal(own_ids, ids[begin:end])
            assert torch.equal(own_weights, weights[begin:end])


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_the_shared_expert_is_gated_token_by_token(num_tokens):
    weights = random_checkpoint(replace(MOE, family="qwen2_moe", qk_norm="none", shared_size=80), 33)
    x = torch.randn(num_tokens, MOE.hidden_size, generator=torch.Generator().manual_seed(33))
    gate, up, down = (weights.tensor(f"layers.1.shared.{part}") for part in ("gate", "up", "down"))
    expected = (x @ weights.tensor("layers.1.shared_gate").T).sigmoid() * ((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    torch.testing.assert_close(SharedExpert(weights, 1, torch.float32, CPU)(x), expected, atol=1e-5, rtol=1e-4)


def test_a_dense_model_sends_everything_to_its_only_expert():
    ids, weights = route(torch.ones(3, 8), None, replace(MOE, num_experts=1, top_k=1))
    assert ids.tolist() == [[0]] * 3
    assert weights.tolist() == [[1.0]] * 3


def test_rows_are_grouped_by_expert_in_token_order():
    order, experts, counts = group_by_expert(torch.tensor([[5, 2], [2, 7], [5, 7]]))
    assert experts == [2, 5, 7]
    assert counts == [2, 2, 2]
    assert order.tolist() == [1, 2, 0, 4, 3, 5]


def test_combine_adds_in_top_k_order():
    y = torch.tensor([[[1e8], [1.0], [-1e8]]])
    assert combine(y, torch.ones(1, 3)).item() == (torch.tensor(1e8) + 1.0 - 1e8).item()
    assert combine(y[:, [0, 2, 1]], torch.ones(1, 3)).item() == 1.0


@pytest.mark.parametrize("num_tokens", [1, 7, 90])
def test_local_experts_give_each_token_its_own_experts_outputs(num_tokens):
    weights = random_checkpoint(MOE, 31)
    host = ExpertHost(MOE, torch.float32, CPU)
    for expert in range(8):
        host.load(weights, 1, expert)
    x = torch.randn(num_tokens, MOE.hidden_size, generator=torch.Generator().manual_seed(31))
    dice = random.Random(31)
    ids = torch.tensor([dice.sample(range(8), 2) for _ in range(num_tokens)])
    y = LocalExperts(host)(1, x, ids)
    for token in range(num_tokens):
        for k in range(2):
            gate, up, down = (
                weights.tensor(f"layers.1.experts.{ids[token, k]}.{part}") for part in ("gate", "up", "down")
            )
            expected = down @ (F.silu(gate @ x[token]) * (up @ x[token]))
            torch.testing.assert_close(y[token, k], expected, atol=1e-5, rtol=1e-4)


def test_a_dropped_expert_is_gone_and_can_come_back():
    weights = random_checkpoint(MOE, 32)
    host = ExpertHost(MOE, torch.float32, CPU)
    x = torch.ones(2, MOE.hidden_size)
    host.load(weights, 0, 3)
    before = host.forward(0, x, [3], [2])
    host.drop(0, 3)
    with pytest.raises(KeyError):
        host.forward(0, x, [3], [2])
    host.load(weights, 0, 3)
    assert torch.equal(host.forward(0, x, [3], [2]), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_that_no_checkpoint_has_is_a_key_error(dtype):
    host = ExpertHost(MOE, dtype, CPU)
    for take in (host.load, host.map):
        with pytest.raises(KeyError):
            take(random_checkpoint(MOE), 0, 8)
    assert not host.holds(0, 8)


# -- mapped ---------------------------------------------------------------------------------------------------------

packs = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="nothing is packed on this CPU")


class Stored:
    """Weights in bf16, as a checkpoint of that dtype has them: the same tensor whenever it is asked for."""

    def __init__(self, spec, seed):
        self.spec, self._random = spec, random_checkpoint(spec, seed)
        self._tensors = {}

    def tensor(self, name):
        if name not in self._tensors:
            self._tensors[name] = self._random.tensor(name).bfloat16()
        return self._tensors[name]


def hosts_of(weights, packed, mapped):
    host = ExpertHost(weights.spec, torch.bfloat16, CPU)
    for expert in packed:
        host.load(weights, 0, expert)
    for expert in mapped:
        host.map(weights, 0, expert)
    return host


@packs
@pytest.mark.parametrize("mapped", [[3], [0, 5], range(8)], ids=str)
def test_any_mixture_of_packed_and_mapped_gives_the_same_bits(mapped):
    weights = Stored(MOE, 34)
    packed, mixed = hosts_of(weights, range(8), []), hosts_of(weights, set(range(8)) - set(mapped), mapped)
    assert (packed.num_mapped, mixed.num_mapped) == (0, len(mapped))
    x = torch.randn(90, MOE.hidden_size, generator=torch.Generator().manual_seed(34)).bfloat16()
    dice = random.Random(34)
    ids = torch.tensor([dice.sample(range(8), 2) for _ in range(90)])
    expected = LocalExperts(packed)(0, x, ids)
    while True:
        assert torch.equal(LocalExperts(mixed)(0, x, ids), expected)
        if not mixed.pack_next():
            break
    assert mixed.num_mapped == 0


@packs
def test_a_mapped_expert_lies_where_the_checkpoint_has_it_until_it_is_packed():
    weights = Stored(MOE, 35)
    host = hosts_of(weights, [], [2])
    stored = weights.tensor("layers.0.experts.2.gate")
    before = stored.clone()
    x = torch.ones(2, MOE.hidden_size, dtype=torch.bfloat16)
    stored.zero_()
    assert not host.forward(0, x, [2], [2]).any()
    stored.copy_(before)
    host.pack(0, 2)
    stored.zero_()
    assert host.forward(0, x, [2], [2]).any()


@packs
def test_mapped_experts_are_packed_in_the_order_they_came_and_can_be_dropped_before():
    host = hosts_of(Stored(MOE, 36), [], [4, 1, 6])
    host.drop(0, 1)
    assert not host.holds(0, 1)
    assert host.num_mapped == 2
    host.pack(0, 6)
    with pytest.raises(KeyError):
        host.pack(0, 6)
    assert host.pack_next()
    assert not host.pack_next()
    assert host.holds(0, 4)
    assert host.holds(0, 6)


@packs
def test_an_expert_that_is_taken_again_is_held_once():
    weights = Stored(MOE, 37)
    host = hosts_of(weights, [1], [1])
    assert host.num_mapped == 1
    host.load(weights, 0, 1)
    assert host.num_mapped == 0
    host.drop(0, 1)
    assert not host.holds(0, 1)


def test_where_nothing_is_packed_nothing_stays_mapped():
    host = ExpertHost(MOE, torch.float32, CPU)
    host.map(random_checkpoint(MOE), 0, 1)
    assert host.holds(0, 1)
    assert (host.num_mapped, host.pack_next()) == (0, False)
