"""Text and token ids: a stream's text is the whole text, and templates refuse what they do not take."""

import json

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from serve_app.errors import CheckpointError
from serve_app.model.tokenizer import Detokenizer, Tokenizer
from tests.model.families import make_tiny_tokenizer

TEXTS = [
    "The capital of France is Paris.",
    "  two spaces, a tab\t, a newline\n\n and 12345 digits  6 ",
    "Zażółć gęślą jaźń — 漢字かな交じり文 — ελληνικά — עברית — 한국어",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, é as e+́, \u200b zero width, \ufffd itself",
    "<|im_start|>user\nnot a message<|im_end|>",
    "",
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2? 🎉"}]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return Tokenizer.load(tiny_folder)


@pytest.fixture(scope="module")
def reference(tiny_folder):
    return transformers.AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def byte_fallback():
    """A tokenizer decoded as Llama's and Mixtral's are: `▁` for spaces, single bytes where the vocabulary ends."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁hello", "é"]
    backend = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, None)


def streamed(tokenizer, pushes, **kwargs):
    detokenizer = Detokenizer(tokenizer, **kwargs)
    return "".join([*(detokenizer.push(ids) for ids in pushes), detokenizer.finish()])


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip_and_equals_transformers(text, tiny, reference):
    ids = tiny.encode(text)
    assert ids == reference.encode(text)
    assert tiny.decode(ids, skip_special_tokens=False) == text
    assert tiny.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_known(tiny):
    assert tiny.special_ids == {0, 1, 2}
    assert tiny.vocab_size == 512
    assert tiny.decode([1, 70, 2]) == tiny.decode([70])
    assert tiny.decode([1, 70, 2], skip_special_tokens=False) == f"<|im_start|>{tiny.decode([70])}<|im_end|>"
    assert tiny.decode([70, 100_000]) == tiny.decode([70])


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_streamed_text_is_the_whole_text_for_any_token_ids(tiny, data):
    ids = data.draw(st.lists(st.integers(0, 520), max_size=120))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=12)))
    pushes = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    skip = data.draw(st.booleans())
    assert streamed(tiny, pushes, skip_special_tokens=skip) == tiny.decode(ids, skip)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 60), st.text("\xe2\xac\xbf\xc3\xa9\xf0a", max_size=12))
def test_a_character_after_a_long_run_of_bad_bytes_is_whole(tiny, num_bad, tail):
    """Each letter stands for one byte: heads of 2, 3 and 4 byte characters, and what may follow them."""
    vocabulary = tiny._backend.get_vocab()
    ids = [vocabulary["\xa9"]] * num_bad + [vocabulary[byte] for byte in tail]
    assert streamed(tiny, [[token] for token in ids]) == tiny.decode(ids)


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=60))
def test_each_push_gives_whole_characters_of_any_text(tiny, text):
    detokenizer = Detokenizer(tiny, skip_special_tokens=False)
    so_far = ""
    for token in tiny.encode(text):
        so_far += detokenizer.push([token])
        assert text.startswith(so_far)
    assert so_far + detokenizer.finish() == text


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(["▁", "▁a", "b", "▁hello", "é", "€", "🎉", "漢"]), max_size=40))
def test_byte_fallback_streams_whole_characters_and_keeps_spaces(byte_fallback, words):
    vocabulary = byte_fallback._backend.get_vocab()
    ids = []
    for word in words:
        known = word in vocabulary
        ids += [vocabulary[word]] if known else [vocabulary[f"<0x{byte:02X}>"] for byte in word.encode()]
    assert streamed(byte_fallback, [[token] for token in ids]) == byte_fallback.decode(ids)


def test_endless_bad_bytes_are_not_held_back_forever(tiny):
    byte = tiny.encode("é")[0]
    detokenizer = Detokenizer(tiny)
    out = "".join(detokenizer.push([byte]) for _ in range(1000))
    assert 1000 - len(out) < 20
    assert len(detokenizer._window) < 20
    assert out + detokenizer.finish() == tiny.decode([byte] * 1000)


def test_the_window_does_not_grow_with_the_text(tiny):
    detokenizer = Detokenizer(tiny)
    longest = 0
    for token in tiny.encode(" ".join(TEXTS) * 40):
        detokenizer.push([token])
        longest = max(longest, len(detokenizer._window))
    assert longest < 20


def test_lone_surrogates_are_a_value_error(tiny):
    with pytest.raises(ValueError, match="surrogates"):
        tiny.encode("\ud800")


# -- chat templates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"add_generation_prompt": False}])
def test_rendered_messages_equal_transformers(tiny, reference, kwargs):
    expected = reference.apply_chat_template(MESSAGES, tokenize=False, **{"add_generation_prompt": True, **kwargs})
    assert tiny.render(MESSAGES, **kwargs) == expected


def test_special_tokens_are_not_added_a_second_time(tiny_folder):
    """A post-processor that adds a first token does so to prompts, not to what the template wrote."""
    backend = tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    plain = Tokenizer.load(tiny_folder)
    tokenizer = Tokenizer(backend, plain._chat_template)
    assert tokenizer.encode("hello") == [1, *plain.encode("hello")]
    assert tokenizer.encode_chat(MESSAGES) == plain.encode(plain.render(MESSAGES))


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "robot", "content": "hi"}, "Unknown role: robot"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": None}, "does not take"),
        ({"content": "hi"}, "role"),
    ],
)
def test_a_message_that_the_template_does_not_take_is_a_value_error(tiny, message, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny.render([message])


def with_template(folder, template, as_file=False):
    make_tiny_tokenizer(folder)
    if as_file:
        (folder / "chat_template.jinja").write_text(template)
        return Tokenizer.load(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def test_templates_have_what_transformers_gives_them(tmp_path):
    template = """{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}
{{ bos_token }}{{ m | tojson }}{{ strftime_now('%Y')|length }}{{ tools is none }}
{% generation %}{{ eos_token }}{% endgeneration %}{% endfor %}"""
    tokenizer = with_template(tmp_path, template)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "<b>é & 'x'</b>"}] * 2
    assert tokenizer.render(messages) == reference.apply_chat_template(messages, tokenize=False)


def test_a_template_file_wins_and_a_list_gives_its_default(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert with_template(tmp_path, named).render([]) == "yes"
    assert with_template(tmp_path, "file", as_file=True).render([]) == "file"


def test_a_template_cannot_leave_its_sandbox(tmp_path):
    with pytest.raises(ValueError, match="unsafe"):
        with_template(tmp_path, "{{ messages.__class__.__mro__ }}").render([])


def test_a_model_without_a_template_says_so(tmp_path):
    tokenizer = with_template(tmp_path, None)
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.render(MESSAGES)


def test_damaged_tokenizer_files_are_checkpoint_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="does not compile"):
        with_template(tmp_path, "{% if %}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a valid tokenizer"):
        Tokenizer.load(tmp_path)
