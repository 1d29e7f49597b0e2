"""What a worker holds changes with the membership: at once, to the same bits, and after the checkpoint is gone."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.config import OctavoConfig
from serve_app.model.checkpoint import Checkpoint
from serve_app.model.cpu import can_pack
from serve_app.runtime.load import load
from tests.model.driver import CPU
from tests.model.families import make_tiny

pytestmark = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="nothing is packed on this CPU")

CONFIG = OctavoConfig.model_validate({"model": "tiny", "dtype": "bfloat16", "worker": {"kv_gib": 0.01}})
LAYERS = range(1, 3)
ALL = [(layer, expert) for layer in LAYERS for expert in range(8)]


@pytest.fixture(params=["mixtral", "qwen3_moe", "granitemoe"])
def folder(request, tmp_path):
    """A checkpoint in bf16: its experts are mapped without a copy."""
    make_tiny(request.param, tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    return tmp_path


def load_experts(folder, pairs):
    return load(Checkpoint.open(folder), CONFIG, LAYERS, 0, pairs)


def num_mappings(folder):
    return Path("/proc/self/maps").read_text().count(f"{folder}/model.safetensors")


def outputs(loaded, pairs):
    """Of each expert, for the same rows."""
    x_ND = torch.randn(33, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    return [loaded.host.forward(layer, x_ND, [expert], [33]) for layer, expert in pairs]


def assert_same(loaded, expected, pairs):
    for pair, found in zip(pairs, outputs(loaded, pairs), strict=True):
        assert torch.equal(found, expected[ALL.index(pair)]), pair


def test_what_is_held_first_is_packed_and_what_comes_later_is_mapped(folder):
    loaded = load_experts(folder, ALL[:5])
    assert loaded.host.num_mapped == 0
    loaded.host_experts(ALL[3:9])
    assert loaded.host.num_mapped == 4
    assert [pair for pair in ALL if loaded.host.holds(*pair)] == ALL[3:9]


def test_each_call_packs_one_until_none_is_left(folder):
    loaded = load_experts(folder, [])
    loaded.host_experts(ALL)
    left = []
    while loaded.pack_next():
        left.append(loaded.host.num_mapped)
    assert left == list(range(len(ALL)))[::-1]
    assert not loaded.pack_next()


def test_a_mapping_lasts_until_its_expert_is_packed_or_dropped(folder):
    loaded = load_experts(folder, [])
    before = num_mappings(folder)
    loaded.host_experts(ALL)
    assert num_mappings(folder) == before + 3 * len(ALL)
    loaded.pack_next()
    assert num_mappings(folder) == before + 3 * (len(ALL) - 1)
    loaded.host_experts(ALL[:1])
    assert num_mappings(folder) == before


def test_the_bits_stay_the_same_through_any_sequence_of_sets(folder):
    expected = outputs(load_experts(folder, ALL), ALL)
    loaded = load_experts(folder, ALL[:6])
    for pairs in (ALL[4:12], ALL[::3], ALL[1::2], [], ALL):
        loaded.host_experts(pairs)
        assert loaded.hosted == set(pairs)
        assert_same(loaded, expected, pairs)
        loaded.pack_next()
        assert_same(loaded, expected, pairs)


def test_experts_come_from_a_checkpoint_whose_folder_was_removed(folder):
    expected = outputs(load_experts(folder, ALL), ALL)
    loaded = load_experts(folder, ALL[:4])
    shutil.rmtree(folder)
    loaded.host_experts(ALL)
    assert_same(loaded, expected, ALL)
    while loaded.pack_next():
        pass
    assert_same(loaded, expected, ALL)


def test_what_is_stored_in_another_dtype_is_the_same_too(tmp_path):
    make_tiny("mixtral", tmp_path)
    expected = outputs(load_experts(tmp_path, ALL), ALL)
    loaded = load_experts(tmp_path, [])
    loaded.host_experts(ALL)
    assert loaded.host.num_mapped == len(ALL)
    assert_same(loaded, expected, ALL)
