"""What a user gives is read as it is meant, or refused in one sentence that names it."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import PlanError
from serve_app.model.spec import ModelSpec, parse_config
from serve_app.plan import inputs
from serve_app.plan.counts import Precision, count_params
from serve_app.plan.inputs import read_lengths, read_model, read_precision, read_system, read_workload
from serve_app.plan.lengths import MAX_POINTS
from serve_app.plan.presets import list_models
from serve_app.plan.workload import Lengths, Objective

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}

Write = Callable[[str], str]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A file `given` with some text; its path."""
    path = tmp_path_factory.mktemp("inputs") / "given"

    def put(text: str) -> str:
        path.write_text(text, encoding="utf-8", errors="replace")
        return str(path)

    return put


def refusal(read: Callable[[str], object], text: str) -> str:
    with pytest.raises(PlanError) as caught:
        read(text)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert not message.removesuffix("...").endswith(".")
    assert len(message) < 700
    return message


class TestModels:
    def test_a_folder_and_its_config_are_the_same_model(self, tmp_path: Path):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        spec = parse_config(CONFIG)
        assert read_model(str(tmp_path)) == read_model(str(tmp_path / "config.json")) == spec

    def test_a_config_may_have_any_name(self, write: Write):
        assert read_model(write(json.dumps(CONFIG))).num_experts == 8

    def test_a_folder_called_as_a_preset_is_reached_by_its_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        folder = tmp_path / "olmoe-1b-7b"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        monkeypatch.chdir(tmp_path)
        assert read_model("olmoe-1b-7b").num_experts == 64
        assert read_model("./olmoe-1b-7b").num_experts == 8

    def test_top_k_replaces_that_of_the_model_within_its_experts(self):
        assert read_model("reference-10b", top_k=2).top_k == 2
        for top_k in (0, -1, 17):
            message = refusal(lambda text, top_k=top_k: read_model(text, top_k=top_k), "reference-10b")
            assert message == f"top_k = {top_k} must be 1 to 16, the experts of a layer"

    def test_an_unknown_model_says_what_is_near_and_how_to_list_all(self):
        message = refusal(read_model, "qwen3-30b")
        assert "qwen3-30b-a3b" in message
        assert "octavo plan --list" in message
        assert "near it" not in refusal(read_model, "some/thing-else-entirely")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"model_type": "deepseek_v3"}, "model_type 'deepseek_v3' is not supported"),
            ({"model_type": None}, "model_type None"),
            ({"hidden_size": None}, "no hidden_size"),
            ({"hidden_size": -64}, "hidden_size must be a positive integer, not -64"),
            ({"hidden_size": 0}, "hidden_size must be"),
            ({"hidden_size": "64"}, "hidden_size must be"),
            ({"hidden_size": 64.0}, "hidden_size must be"),
            ({"num_experts": None}, "num_local_experts"),
            ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9 but there are 8 experts"),
            ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
            ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
            ({"rms_norm_eps": math.inf}, "rms_norm_eps"),
            ({"rms_norm_eps": 10**400}, "value of no use"),
            ({"num_hidden_layers": 10**9}, "num_layers = 1000000000 is beyond 10,000"),
            ({"vocab_size": 10**40}, "vocab_size"),
            ({"quantization_config": {"bits": [4] * 9000}}, "is not supported"),
            ({"model_type": "qwen2_moe", "shared_expert_intermediate_size": 8, "layer_types": 5}, "value of no use"),
        ],
    )
    def test_a_config_that_cannot_be_is_refused_by_its_field(self, write: Write, change: dict[str, object], said: str):
        assert said in refusal(read_model, write(json.dumps(CONFIG | change)))

    @pytest.mark.parametrize("cut", [0, 1, 20, -1])
    def test_a_truncated_config_is_refused(self, write: Write, cut: int):
        assert "is not valid JSON" in refusal(read_model, write(json.dumps(CONFIG)[:cut]))

    @pytest.mark.parametrize("text", ["[]", "1", '"x"', "null"])
    def test_json_that_is_no_object_is_refused(self, write: Write, text: str):
        assert "does not hold a JSON object" in refusal(read_model, write(text))

    def test_folders_without_a_config_are_refused(self, tmp_path: Path):
        assert "has no config.json" in refusal(read_model, str(tmp_path))
        (tmp_path / "config.json").mkdir()
        assert "cannot be read" in refusal(read_model, str(tmp_path))

    @pytest.mark.parametrize(
        "text", ["", " ", "\0", "/dev/null", "a" * 10_000, "\ud800", "a\nb", "./nowhere", "reference"]
    )
    def test_no_name_breaks_the_look_up(self, text: str):
        refusal(read_model, text)

    @given(
        field=st.sampled_from(
            [*CONFIG, "rope_scaling", "layer_types", "eos_token_id", "sliding_window", "torch_dtype"]
        ),
        value=st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=12), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    )
    def test_any_value_in_a_config_gives_a_countable_model_or_one_sentence(
        self, write: Write, field: str, value: object
    ):
        try:
            spec = read_model(write(json.dumps(CONFIG | {field: value})))
        except PlanError as error:
            assert "\n" not in str(error)
            return
        assert isinstance(spec, ModelSpec)
        assert 0 < float(count_params(spec).total) < math.inf

    @given(text=st.text())
    def test_any_text_as_a_config_is_refused(self, write: Write, text: str):
        refusal(read_model, write(text))

    def test_a_model_and_a_preset_contradict(self):
        assert inputs.choose_model("folder", None) == "folder"
        assert inputs.choose_model(None, "reference-10b") == "reference-10b"
        with pytest.raises(PlanError, match="--model 'a' and --preset 'b' contradict"):
            inputs.choose_model("a", "b")
        with pytest.raises(PlanError, match="no model is given"):
            inputs.choose_model(None, None)


class TestLengths:
    def test_a_number_is_one_length(self):
        assert read_lengths("1024") == Lengths.fixed(1024)

    def test_two_numbers_are_a_range(self):
        assert read_lengths("128:10240") == Lengths.uniform(128, 10_240)
        assert read_lengths("7:7") == Lengths.fixed(7)

    @pytest.mark.parametrize(
        "text",
        [
            "128,1\n10240,3\n",
            "tokens,weight\n128,1\n10240,3",
            "\ufefftokens,count\r\n128,1\r\n\r\n10240,3\r\n",
            '"128","1"\n 10240 , 3.0 ',
            "10240,1.5\n128,1\n10240,1.5\n64,0",
            '{"128": 0.25, "10240": 0.75}',
            "[[10240, 3], [128, 1]]",
            '[["128", 1e308], [10240, 1e308], [10240, 1e308], [10240, 1e308]]',
            '{"128": 1, "10240": 1, "10240": 2}',
        ],
    )
    def test_every_form_of_a_histogram_is_the_same_distribution(self, write: Write, text: str):
        lengths = read_lengths(write(text))
        assert [tokens for tokens, _ in lengths.points] == [128, 10_240]
        assert [weight for _, weight in lengths.points] == pytest.approx([0.25, 0.75])

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "no length with a weight above 0"),
            ("tokens,weight\n", "no length with a weight above 0"),
            ("128,0\n", "no length with a weight above 0"),
            ("{}", "no length with a weight above 0"),
            ("[]", "no length with a weight above 0"),
            ("128,1\n0,1", "line 2 of"),
            ("128,1\n\n-5,1", "line 3 of"),
            ("128,1\nx,1", "line 2 of"),
            ("128,1\ntokens,weight", "line 2 of"),
            ("128.5,1", "tokens must be a whole number, not '128.5'"),
            ("nan,1", "line 1 of"),
            ("nan,inf", "line 1 of"),
            ("128,nan", "a weight must be a number of at least 0, not 'nan'"),
            ("128,-1", "not '-1'"),
            ("128,inf", "not 'inf'"),
            ("128,much", "not 'much'"),
            ("128", "must be `tokens,weight`, not '128'"),
            ("128,1,2", "must be `tokens,weight`"),
            ("128;1", "must be `tokens,weight`"),
            ("128,1\n\0,\0", "line 2 of"),
            ("9" * 5000 + ",1", "tokens must be 1 to 100,000,000"),
            ('{"128": "much"}', "entry 1 of"),
            ('{"128": null}', "entry 1 of"),
            ('{"128": true}', "entry 1 of"),
            ('{"128": {"1": 2}}', "entry 1 of"),
            ('{"x": 1}', "entry 1 of"),
            ("[[128, 1], [true, 1]]", "entry 2 of"),
            ("[[128, 1], [1.5, 1]]", "entry 2 of"),
            ("[[128, 1], [5]]", "entry 2 of"),
            ('[[128, 1], "ab"]', "entry 2 of"),
            ("[[128, 1], 3]", "entry 2 of"),
            ("[[128, NaN]]", "entry 1 of"),
            ("[[128, 1", "is not valid JSON"),
            ("[" * 100_000, "is not valid JSON"),
        ],
    )
    def test_a_broken_histogram_is_refused_where_it_breaks(self, write: Write, text: str, said: str):
        message = refusal(read_lengths, write(text))
        assert said in message
        assert "given" in message

    @pytest.mark.parametrize(
        "text", ["0", "5:0", "0:5", "10:5", "-1", "1.5", "nan", "inf", "", ":", "1:", "1:2:3", "1_0"]
    )
    def test_a_length_that_cannot_be_is_refused_by_its_option(self, text: str):
        message = refusal(lambda text: read_lengths(text, name="--isl"), text)
        assert message.startswith("--isl")

    @pytest.mark.parametrize("text", ["１２", "\0", "9" * 5000, "a" * 10_000, "nowhere.csv", "\ud800"])
    def test_no_text_breaks_the_reader(self, text: str):
        refusal(read_lengths, text)

    def test_a_folder_is_no_histogram(self, tmp_path: Path):
        assert "is not a file" in refusal(read_lengths, str(tmp_path))

    @given(text=st.text(alphabet=st.sampled_from('0123456789,:.-+einfaNx[]{}"\n \0')))
    def test_any_text_is_a_distribution_or_one_sentence(self, write: Write, text: str):
        for given_text in (text, write(text)):
            try:
                lengths = read_lengths(given_text)
            except PlanError as error:
                assert "\n" not in str(error)
            else:
                assert sum(weight for _, weight in lengths.points) == pytest.approx(1)

    @pytest.mark.parametrize("seed", range(5))
    def test_a_fine_histogram_is_thinned_without_losing_its_ends_its_mean_or_its_quantiles(
        self, write: Write, seed: int
    ):
        rng = random.Random(seed)
        counts = [(int(rng.lognormvariate(7, 1.2)) + 1, rng.random()) for _ in range(5000)]
        fine = Lengths.of(counts)
        thin = read_lengths(write("".join(f"{tokens},{weight}\n" for tokens, weight in counts)))
        assert len(fine.points) > MAX_POINTS >= len(thin.points), seed
        assert (thin.points[0][0], thin.most) == (fine.points[0][0], fine.most), seed
        assert thin.mean == pytest.approx(fine.mean, rel=1e-3), seed
        assert thin.mean_square == pytest.approx(fine.mean_square, rel=0.01), seed
        for share in (0.1, 0.5, 0.9, 0.99):
            assert thin.quantile(share) == pytest.approx(fine.quantile(share), rel=0.1, abs=1), (seed, share)

    def test_a_histogram_of_no_more_points_than_are_reckoned_with_is_kept_as_it_is(self, write: Write):
        counts = [(3 * i + 1, i % 7 + 1) for i in range(MAX_POINTS)]
        read, whole = read_lengths(write(json.dumps(counts))), Lengths.of(counts)
        assert [tokens for tokens, _ in read.points] == [tokens for tokens, _ in whole.points]
        assert [weight for _, weight in read.points] == pytest.approx([weight for _, weight in whole.points])


class TestPrecision:
    def test_one_name_is_all_classes(self):
        assert read_precision("bf16") == Precision()
        assert read_precision("fp8") == Precision("fp8", "fp8", "fp8", "fp8")
        assert all(read_precision(name).weights == name for name in inputs.PRECISIONS)

    def test_classes_may_differ_from_it(self):
        assert read_precision("bf16,experts=fp8,kv=fp8") == Precision("bf16", "fp8", "fp8", "bf16")
        assert read_precision("int4", read_system("a100")).compute == "bf16"  # held in 4 bits, multiplied in 16

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "precision '' is not known"),
            ("fp9", "'fp9' is not known: fp32"),
            ("FP8", "'FP8'"),
            ("kv=fp8", "'kv=fp8'"),
            ("bf16,kv", "kv = '' is no known dtype"),
            ("bf16,kv=fp9", "kv = 'fp9'"),
            ("bf16,cache=fp8", "'cache' is no class"),
            ("bf16,kv=fp8,kv=bf16", "kv is there twice"),
            ("bf16,", "''"),
        ],
    )
    def test_what_is_not_known_is_refused(self, text: str, said: str):
        assert said in refusal(read_precision, text)

    def test_a_dtype_that_the_hardware_does_not_compute_in_is_refused_and_never_replaced(self):
        message = refusal(lambda text: read_precision(text, read_system("a100")), "fp8")
        assert "a100-80 has no peak_tflops for fp8" in message
        assert "compute=" in message
        assert read_precision("fp8,compute=bf16", read_system("a100")).compute == "bf16"
        assert read_precision("fp8", read_system("h100")).compute == "fp8"

    @given(text=st.text(alphabet=st.sampled_from("bf1684int=,kvcompute ")))
    def test_any_text_is_a_precision_or_one_sentence(self, text: str):
        try:
            assert read_precision(text).weight_bytes > 0
        except PlanError as error:
            assert "\n" not in str(error)


class TestWorkload:
    def test_without_a_rate_or_a_number_128_sequences_are_meant(self):
        workload = read_workload("1024", "128:256")
        assert (workload.concurrency, workload.rate) == (128, None)
        assert read_workload("1", "1", rate=2.5).concurrency is None

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"rate": 1.0, "concurrency": 2}, "either a concurrency or a rate"),
            ({"rate": 0.0}, "rate must be above 0"),
            ({"rate": -1.0}, "rate must be above 0"),
            ({"rate": math.nan}, "rate must be a number"),
            ({"rate": math.inf}, "rate must be a number"),
            ({"concurrency": 0}, "concurrency must be above 0"),
            ({"prefix_share": 1.0}, "prefix_share must be"),
            ({"prefix_share": math.nan}, "prefix_share must be a number"),
            ({"burstiness": 0.0}, "burstiness must be above 0"),
            ({"chunk_tokens": 0}, "chunk_tokens must be above 0"),
            ({"objective": Objective(ttft_s=0)}, "ttft_s must be above 0"),
            ({"objective": Objective(tpot_ms=math.nan)}, "tpot_ms must be above 0"),
            ({"objective": Objective(recovery_s=math.inf)}, "recovery_s must be above 0"),
            ({"objective": Objective(availability=1.0)}, "availability must be a share below 1"),
            ({"isl": "0"}, "--isl"),
            ({"osl": "none"}, "--osl 'none'"),
        ],
    )
    def test_numbers_that_contradict_or_cannot_be_are_refused_by_their_name(
        self, options: dict[str, object], said: str
    ):
        given_options = {"isl": "10", "osl": "10"} | options
        assert said in refusal(lambda _: read_workload(**given_options), "")


def test_every_listed_model_can_be_read():
    assert [read_model(preset.name) for preset in list_models()] == [preset.spec for preset in list_models()]
