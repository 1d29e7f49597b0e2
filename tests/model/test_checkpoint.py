"""A checkpoint is checked from its headers before anything starts, and read tensor by tensor."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.errors import CheckpointError
from serve_app.model.checkpoint import Checkpoint
from serve_app.model.files import check_folder, expected_tensors, locate_tensors
from tests.model.families import VARIANTS, make_tiny


@pytest.fixture
def mixtral(tmp_path):
    make_tiny("mixtral", tmp_path)
    return tmp_path


@pytest.fixture
def granite(tmp_path):
    make_tiny("granitemoe", tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    make_tiny("qwen3_moe", tmp_path).save_pretrained(tmp_path, max_shard_size="200KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    return tmp_path


def rewrite(folder, change):
    """Apply `change` to the dict of tensors in the folder's single file."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_that_transformers_writes_has_a_canonical_name(variant, tmp_path):
    family, overrides = VARIANTS[variant]
    make_tiny(family, tmp_path, **overrides)
    checkpoint = Checkpoint.open(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    expected = expected_tensors(checkpoint.spec)
    assert {tensor.hf_name for tensor in expected.values()} == set(written)
    for name, (hf_name, shape, cut, _) in expected.items():
        tensor = checkpoint.tensor(name)
        assert tensor.shape == shape
        assert torch.equal(tensor, written[hf_name][cut.expert, cut.begin : cut.end] if cut else written[hf_name])


def test_experts_are_told_apart(mixtral):
    checkpoint = Checkpoint.open(mixtral)
    written = load_file(mixtral / "model.safetensors")
    prefix = "model.layers.2.block_sparse_moe"
    assert torch.equal(checkpoint.tensor("layers.2.experts.5.gate"), written[f"{prefix}.experts.5.w1.weight"])
    assert torch.equal(checkpoint.tensor("layers.2.experts.5.up"), written[f"{prefix}.experts.5.w3.weight"])
    assert torch.equal(checkpoint.tensor("layers.2.experts.5.down"), written[f"{prefix}.experts.5.w2.weight"])
    assert torch.equal(checkpoint.tensor("layers.2.gate"), written[f"{prefix}.gate.weight"])


def test_packed_experts_are_taken_apart_without_reading_the_others(granite):
    checkpoint = Checkpoint.open(granite)
    packed = load_file(granite / "model.safetensors")["model.layers.2.block_sparse_moe.input_linear.weight"]
    gate, up = (checkpoint.tensor(f"layers.2.experts.5.{part}") for part in ("gate", "up"))
    assert torch.equal(torch.cat([gate, up]), packed[5])
    first = checkpoint.tensor("layers.2.experts.0.gate")
    assert place_in_file(gate) - place_in_file(first) == 5 * packed[0].nbytes
    assert place_in_file(up) - place_in_file(gate) == gate.nbytes


def test_shards_are_read_as_one(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 1
    checkpoint = Checkpoint.open(sharded)
    written = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for name, expected in expected_tensors(checkpoint.spec).items():
        assert torch.equal(checkpoint.tensor(name), written[expected.hf_name])


def mappings():
    """(begin, end, offset in the file) of each part of a checkpoint's file that is mapped here."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    for ends, _, offset, *_ in (line.split() for line in lines if line.endswith("model.safetensors")):
        begin, end = (int(address, 16) for address in ends.split("-"))
        yield begin, end, int(offset, 16)


def place_in_file(tensor):
    """Bytes from the file's beginning to the tensor; None where it is no view of the mapped file."""
    address = tensor.data_ptr()
    return next((address - begin + offset for begin, end, offset in mappings() if begin <= address < end), None)


def test_tensors_are_views_of_the_mapped_file(mixtral):
    assert place_in_file(Checkpoint.open(mixtral).tensor("embed")) is not None


def test_what_was_read_is_unmapped_with_the_tensor(mixtral):
    checkpoint = Checkpoint.open(mixtral)
    kept = checkpoint.tensor("embed")
    assert checkpoint.tensor("norm").sum() != 0
    assert [begin <= kept.data_ptr() < end for begin, end, _ in mappings()] == [True]


def num_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_folder_that_is_removed_goes_on_serving(sharded):
    expected = {
        name: tensor.clone() for shard in sharded.glob("*.safetensors") for name, tensor in load_file(shard).items()
    }
    checkpoint = Checkpoint.open(sharded)
    shutil.rmtree(sharded)
    for name, tensor in expected_tensors(checkpoint.spec).items():
        assert torch.equal(checkpoint.tensor(name), expected[tensor.hf_name])


def test_a_file_that_is_replaced_is_read_as_it_was(mixtral):
    checkpoint = Checkpoint.open(mixtral)
    before = checkpoint.tensor("embed").clone()
    (mixtral / "model.safetensors").rename(mixtral / "old")
    (mixtral / "model.safetensors").write_bytes(bytes((mixtral / "old").stat().st_size))
    assert torch.equal(checkpoint.tensor("embed"), before)


def test_each_file_takes_one_descriptor_for_as_long_as_the_checkpoint_lives(sharded):
    before = num_descriptors()
    checkpoint = Checkpoint.open(sharded)
    opened = num_descriptors() - before
    assert opened == len(list(sharded.glob("*.safetensors")))
    kept = [checkpoint.tensor(name) for name in expected_tensors(checkpoint.spec)]
    assert num_descriptors() == before + opened
    expected = kept[0].clone()
    del checkpoint
    assert num_descriptors() == before
    assert torch.equal(kept[0], expected)


def test_a_checkpoint_that_cannot_be_opened_leaves_no_descriptor(sharded):
    spec, located = locate_tensors(sharded)
    before = num_descriptors()
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError):
        Checkpoint(spec, located)
    assert num_descriptors() == before


def test_a_tensor_may_begin_at_any_byte(mixtral):
    """The format does not align: only those who write it do."""
    before = Checkpoint.open(mixtral).tensor("embed").clone()
    path = mixtral / "model.safetensors"
    whole = path.read_bytes()
    header_bytes = struct.unpack("<Q", whole[:8])[0]
    path.write_bytes(
        struct.pack("<Q", header_bytes + 1) + whole[8 : 8 + header_bytes] + b" " + whole[8 + header_bytes :]
    )
    assert torch.equal(Checkpoint.open(mixtral).tensor("embed"), before)


def test_writing_to_a_tensor_leaves_the_file_alone(mixtral):
    checkpoint = Checkpoint.open(mixtral)
    checkpoint.tensor("embed").zero_()
    assert checkpoint.tensor("embed").any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_files_dtype_is_the_specs(mixtral, dtype):
    rewrite(mixtral, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    checkpoint = Checkpoint.open(mixtral)
    assert checkpoint.spec.dtype == str(dtype).removeprefix("torch.")
    assert checkpoint.tensor("norm").dtype == dtype


def test_an_unknown_tensor_is_a_programmers_error(mixtral):
    with pytest.raises(KeyError):
        Checkpoint.open(mixtral).tensor("head.bias")


# -- bad folders --------------------------------------------------------------------------------------------------


def refuses(folder, sentence):
    with pytest.raises(CheckpointError, match=sentence) as caught:
        check_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    refuses(tmp_path / "nowhere", "nowhere does not exist")


def test_a_missing_or_broken_config_is_named(mixtral):
    for text in ("{", "[]", '"x"', "[" * 100_000):
        (mixtral / "config.json").write_text(text)
        refuses(mixtral, r"config\.json (is not valid JSON|does not hold a JSON object)")
    (mixtral / "config.json").unlink()
    refuses(mixtral, r"has no config\.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_refused(mixtral, name):
    (mixtral / "model.safetensors").rename(mixtral / name)
    refuses(mixtral, "pickle checkpoint, which is refused: convert it to safetensors")


def test_a_folder_without_weights_says_so(mixtral):
    (mixtral / "model.safetensors").unlink()
    refuses(mixtral, r"neither model\.safetensors nor")


def test_a_missing_tensor_is_named(mixtral):
    rewrite(mixtral, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"))
    refuses(mixtral, r"no tensor model\.layers\.1\.block_sparse_moe\.experts\.3\.w2\.weight")


def test_a_wrong_shape_is_named_with_both_shapes(mixtral):
    config = json.loads((mixtral / "config.json").read_text()) | {"intermediate_size": 50}
    (mixtral / "config.json").write_text(json.dumps(config))
    refuses(mixtral, r"experts\.0\.w1\.weight in .* has shape \[48, 64\] where config\.json asks for \[50, 64\]")


def test_a_wrong_shape_of_packed_experts_is_named_as_the_file_has_it(granite):
    config = json.loads((granite / "config.json").read_text()) | {"num_local_experts": 7}
    (granite / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    rewrite(granite, lambda tensors: tensors.update({key: tensors[key][:7] for key in tensors if "router" in key}))
    refuses(granite, rf"{name} in .* has shape \[8, 96, 64\] where config\.json asks for \[7, 96, 64\]")


def test_an_unsupported_dtype_is_named(mixtral):
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(mixtral, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    refuses(mixtral, "q_proj.weight .* has dtype F8_E4M3; supported are BF16, F16, F32")


def test_a_truncated_file_is_caught_wherever_it_ends(mixtral):
    path = mixtral / "model.safetensors"
    whole = path.read_bytes()
    header_bytes = struct.unpack("<Q", whole[:8])[0]
    for kept in (len(whole) - 1, 8 + header_bytes, 8 + header_bytes // 2, 8, 4, 0):
        path.write_bytes(whole[:kept])
        refuses(mixtral, r"model\.safetensors is truncated")
    path.write_bytes(whole + b"\0")
    refuses(mixtral, r"model\.safetensors is damaged")


@pytest.mark.parametrize(
    "header",
    [
        b"not JSON",
        b"[]",
        b'{"x": 1}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"x": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_damaged_header_is_caught(mixtral, header):
    (mixtral / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    refuses(mixtral, "has a damaged safetensors header")


def test_a_text_in_the_place_of_the_weights_is_no_safetensors_file(mixtral):
    (mixtral / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refuses(mixtral, "is not a safetensors file")


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refuses(sharded, f"the shard '{shard.name}' that the index names is not in")


@pytest.mark.parametrize("weight_map", [None, [], {"x": 1}, {"x": "../model.safetensors"}])
def test_an_index_is_not_trusted(sharded, weight_map):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refuses(sharded, "has no valid weight_map|the shard .* is not in")


def test_a_tensor_that_its_shard_lacks_is_missing(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(sharded, r"no tensor model\.norm\.weight")
