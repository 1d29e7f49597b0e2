"""What cannot run ends with one clear sentence and a status that is not 0."""

import shutil
import struct

import pytest

from tests.cluster.server import free_port, run_to_its_end, write_config
from tests.model.families import make_tiny, make_tiny_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny("mixtral", folder)
    make_tiny_tokenizer(folder, 512)
    return folder


def damaged(tiny, folder, how):
    shutil.copytree(tiny, folder)
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "misshapen":
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"vocab_size": 512', '"vocab_size": 500'))
    elif how == "header":
        weights.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    elif how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "broken tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif how == "broken template":
        (folder / "chat_template.jinja").write_text("{% for")
    elif how == "template in Latin 1":
        (folder / "chat_template.jinja").write_bytes(b"\xe9")
    return str(folder)


def octavo_serve(folder, args):
    return run_to_its_end(["octavo", "serve", write_config(folder, args, free_port())])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"modle": "demo"}, ["`modle` is not a key"]),
        ({"layout": {"pp": 99}}, ["layout does not fit", "99"]),
        ({"layout": {"tp": 5}}, ["layout does not fit", "num_shards=5", "4 attention heads"]),
        ({"layout": {"pp": 2, "stage_layers": [3, 0]}}, ["`layout.stage_layers.1` = 0"]),
        ({"layout": {"pp": 2, "stage_layers": [2, 2]}}, ["layout does not fit", "[2, 2]", "the model's 3"]),
        ({"layout": {"dp": 2}, "worker": {"primary_slots": 11}}, ["`worker.primary_slots` = 11", "needs 12"]),
        ({"model": "/nowhere"}, ["/nowhere"]),
        ({"layout": {"dp": "two"}}, ["`layout.dp`"]),
        ({"scheduler": {"max_step_tokens": 10**8}}, ["`scheduler.max_step_tokens`", "at most 4194304"]),
    ],
)
def test_a_config_that_cannot_run_is_refused_before_ray_starts(tiny, tmp_path, args, words):
    status, printed = octavo_serve(tmp_path, {"model": str(tiny)} | args)
    assert status == 1
    assert all(word in printed for word in words), printed
    assert "Traceback" not in printed
    assert "Ray" not in printed


DAMAGES = {
    "truncated": "truncated",
    "misshapen": "shape",
    "header": "not a safetensors file",
    "pickle": "pickle",
    "no tokenizer": "has no tokenizer.json",
    "broken tokenizer": "not a valid tokenizer",
    "broken template": "chat template does not compile",
    "template in Latin 1": "cannot be read",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_refused_before_ray_starts(tiny, tmp_path, how):
    status, printed = octavo_serve(tmp_path, {"model": damaged(tiny, tmp_path / "model", how)})
    assert status == 1
    assert printed.startswith("octavo: ")
    assert DAMAGES[how] in printed
    assert "Traceback" not in printed
    assert "Ray" not in printed


@pytest.mark.cluster
def test_plain_serve_run_ends_too(tiny, tmp_path):
    """Where Ray alone would report a failed application and sleep on."""
    config = write_config(tmp_path, {"model": str(tiny), "layout": {"pp": 99}}, free_port())
    status, printed = run_to_its_end(["serve", "run", config])
    assert status != 0
    assert "octavo cannot run: the layout does not fit the model" in printed
    assert "WorkerActor" not in printed
