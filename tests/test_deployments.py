"""Every config that comes with the project can be served."""

import math
import os
from pathlib import Path

import pytest
import yaml

from serve_app.config import IMPORT_PATH, parse_config
from serve_app.experts.layout import stage_layers
from serve_app.fetch.demo import put_demo_tokenizer
from serve_app.fetch.progress import silent
from serve_app.fetch.reference import CONFIG
from serve_app.fetch.write import header, num_bytes, write_configs
from serve_app.model.files import expected_tensors
from serve_app.model.spec import parse_config as parse_model
from serve_app.runtime.settings import check, max_context_tokens

FILES = sorted((Path(__file__).parent.parent / "deployments").glob("*.yaml"))


@pytest.fixture(scope="module")
def hollow_reference(demo_folder, tmp_path_factory):
    """The reference model with all its headers and, instead of weights, a hole in the file."""
    folder = tmp_path_factory.mktemp("hollow")
    write_configs(CONFIG, folder)
    put_demo_tokenizer(folder, silent)
    tensors = expected_tensors(parse_model(CONFIG))
    (folder / "model.safetensors").write_bytes(head := header(tensors.values()))
    os.truncate(folder / "model.safetensors", len(head) + num_bytes(tensors))
    return folder


@pytest.fixture
def folders(demo_folder, hollow_reference):
    return {"demo": demo_folder, "reference": hollow_reference}


def room_for_tokens(config, spec):
    """How many tokens' KV a worker of the largest stage has room for, in fp32."""
    num_layers = max(map(len, stage_layers(spec.num_layers, config.layout.pp)))
    num_kv_heads = math.ceil(spec.num_kv_heads / config.layout.tp)
    return int(config.worker.kv_gib * 2**30) // (2 * num_layers * num_kv_heads * spec.head_dim * 4)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_config_that_comes_with_the_project_fits_its_model(path, folders):
    ours = [entry for entry in yaml.safe_load(path.read_text())["applications"] if entry["import_path"] == IMPORT_PATH]
    assert ours
    for entry in ours:
        config = parse_config(entry["args"])
        spec = check(config.model_copy(update={"model": str(folders[config.model])}))
        assert room_for_tokens(config, spec) >= max_context_tokens(config, spec)


def test_there_are_configs():
    assert {"config.yaml", "reference-cpu.yaml", "reference-gpu.yaml"} <= {path.name for path in FILES}
