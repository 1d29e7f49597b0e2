"""What shards promise each other, whatever carries it: threads, the mesh, or collectives (NCCL on GPUs, gloo here)."""

import random
from contextlib import ExitStack

import pytest
import torch

from serve_app.model.shards import add_partials, embed, gather, join_columns, sum_over
from serve_app.runtime.collective_shards import CollectiveShards, open_store
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.mesh_shards import MeshShards
from serve_app.runtime.threads import ThreadGroup
from serve_app.runtime.wire import ShardPart

CPU = torch.device("cpu")
WAIT_S = 60.0
TRANSPORTS = ["threads", "mesh", "gloo"]


def run_shards(transport, num, function):
    """[function(shards of 0), ...], each in a thread of its own."""
    if transport == "threads":
        group = ThreadGroup(num)
        return group.run(lambda index: function(group.shards[index]))
    with ExitStack() as stack:
        if transport == "mesh":
            made = _mesh_shards(stack, num)
            return ThreadGroup(num).run(lambda index: function(made[index]))
        device = "nccl" if transport == "nccl" else "gloo"
        store, address = open_store("127.0.0.1")

        def run(index):
            shards = CollectiveShards(
                epoch=1, index=index, num=num, store=address, backend=device, pump=lambda timeout_s: None
            )
            return function(shards)

        results = ThreadGroup(num).run(run)
        del store
        return results


def _mesh_shards(stack, num):
    meshes = [stack.enter_context(Mesh()) for _ in range(num)]
    names = [f"s{index}" for index in range(num)]
    for mesh in meshes:
        for name, other in zip(names, meshes, strict=True):
            mesh.connect(name, other.address)
    made = []

    def pump_of(index):
        def pump(timeout_s):
            received = meshes[index].receive(timeout_s)
            if received is not None:
                assert isinstance(received.message, ShardPart)
                made[index].accept(received.message, received.frame)

        return pump

    for index, mesh in enumerate(meshes):
        made.append(MeshShards(mesh, epoch=1, peers=names, index=index, device=CPU, pump=pump_of(index)))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_each_shard_gets_what_each_gave_it_round_after_round(transport, num, dtype):
    def part(round_, giver, taker):
        draw = random.Random(f"{round_} {giver} {taker}")
        rows = draw.choice([0, 0, 1, 5])
        return torch.arange(rows * 3).view(rows, 3).to(dtype) + 100 * giver + 10 * taker + round_

    def rounds(shards):
        for round_ in range(8):
            parts = [part(round_, shards.index, taker) for taker in range(num)]
            due = [part(round_, giver, shards.index) for giver in range(num)]
            given = shards.exchange(parts, [tuple(one.shape) for one in due])
            assert all(torch.equal(one, other) for one, other in zip(given, due, strict=True))
        return True

    assert run_shards(transport, num, rounds) == [True] * num


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_is_built_on_it_gives_the_same_bits_on_every_transport(transport):
    num, vocab_size = 3, 11
    table = torch.randn(vocab_size, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    tokens = torch.tensor([0, 10, 3, 3, 7, 5, 9, 1])

    def step(shards):
        begin, end = vocab_size * shards.index // num, vocab_size * (shards.index + 1) // num
        x = embed(table[begin:end], range(begin, end), vocab_size, tokens, shards).float()
        whole = gather(x, [2, 3, 3], shards)
        assert torch.equal(whole, table[tokens].float())
        partial = whole * (shards.index + 1) / 3
        add_partials(x, partial, shards)
        total = sum_over(whole[:1] * shards.index, shards)
        logits = join_columns(whole[:, :1].repeat(1, end - begin) + shards.index, vocab_size, shards)
        return x, total, logits

    steps = run_shards(transport, num, step)
    expected = table[tokens].float()
    for share in (1, 2, 3):
        expected = expected + table[tokens].float() * share / 3
    assert torch.equal(torch.cat([x for x, _, _ in steps]), expected)
    assert all(torch.equal(total, table[tokens[:1]].float() * 3) for _, total, _ in steps)
    assert steps[0][2].shape == (8, vocab_size)
    assert all(len(logits) == 0 for _, _, logits in steps[1:])


@pytest.mark.parametrize("backend", ["gloo"])
def test_a_new_epoch_s_group_is_built_beside_one_whose_member_is_gone(backend):
    store, address = open_store("127.0.0.1")

    def build(epoch, index, num):
        return CollectiveShards(
            epoch=epoch, index=index, num=num, store=address, backend=backend, pump=lambda timeout_s: None
        )

    old = ThreadGroup(3).run(lambda index: build(1, index, 3))
    old[2].leave()
    del old[2]  # it died

    def go_on(index):
        old[index].leave()
        shards = build(2, index, 2)
        return shards.exchange([torch.tensor([index])] * 2, [(1,), (1,)])

    assert ThreadGroup(2).run(go_on) == [[torch.tensor([0]), torch.tensor([1])]] * 2
    del store


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two CUDA devices: not run here")
def test_nccl_gives_each_shard_what_each_gave_it():
    def swap(shards):
        device = torch.device("cuda", shards.index)
        torch.cuda.set_device(device)
        given = shards.exchange([torch.full((2,), shards.index, device=device)] * 2, [(2,), (2,)])
        return [one.tolist() for one in given]

    assert run_shards("nccl", 2, swap) == [[[0, 0], [1, 1]]] * 2
