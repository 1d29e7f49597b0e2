"""A system is what its data sheet or its file says; whatever is no hardware is refused in one sentence."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import PlanError
from serve_app.plan.counts import DTYPE_BYTES
from serve_app.plan.inputs import list_systems, read_system
from serve_app.plan.system import PUBLIC_TPOT, Efficiency, Interval, System, is_calibrated
from serve_app.plan.systems import FITTED_SHARES, GUESSED_SHARES, Listed

SYSTEMS = {listed.name: listed for listed in list_systems()}
PLAIN = {
    "peak_tflops": {"fp16": 100},
    "memory_gb": 24,
    "memory_gb_s": 900.5,
    "intra_gb_s": 32,
    "inter_gb_s": 12.5,
}

Write = Callable[[str], str]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A file `mine.yaml` with some text; its path."""
    path = tmp_path_factory.mktemp("systems") / "mine.yaml"

    def put(text: str) -> str:
        path.write_text(text, encoding="utf-8")
        return str(path)

    return put


def of_all() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("listed", SYSTEMS.values(), ids=SYSTEMS.keys())


def refusal(text: str) -> str:
    """The message, which must be one line."""
    with pytest.raises(PlanError) as caught:
        read_system(text)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert not message.endswith(".") or message.endswith("...")  # what is quoted may have been cut
    return message


def test_reference_is_what_the_document_says():
    system = read_system("reference")
    assert system.peak_tflops == {"fp16": 400}
    assert (system.memory_gb, system.memory_gb_s) == (64, 1800)
    assert (system.intra_gb_s, system.inter_gb_s, system.gpus_per_node) == (450, 50, 8)
    assert system.efficiency == Efficiency(mfu=0.6, bandwidth=0.8)
    assert system.peak_flops("bf16") * system.efficiency.mfu == pytest.approx(240e12)


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200", "gb200", "mi300x", "l40s", "l4", "910b"])
def test_the_usual_accelerators_are_there(name: str):
    assert read_system(name).peak_flops("bf16") > 1e14


@of_all()
def test_every_entry_names_its_source_and_says_that_its_shares_are_guessed(listed: Listed):
    """But for the reference, whose shares the document gives, and those that were fitted to public runs. None pretends
    to have been measured."""
    assert re.search("data sheet|white paper|unverified|document", listed.system.source)
    fitted = listed.system.tpot_interval == PUBLIC_TPOT
    assert (FITTED_SHARES in listed.system.source) == fitted
    assert (GUESSED_SHARES in listed.system.source) == (listed.name != "reference" and not fitted)
    assert not is_calibrated(listed.system)
    assert ("efficiency" in listed.system.model_fields_set) == (listed.name == "reference" or fitted)


@of_all()
def test_peaks_are_dense_of_known_dtypes_and_no_narrower_is_slower_without_the_sheet_saying_so(listed: Listed):
    peaks = listed.system.peak_tflops
    assert set(peaks) <= set(DTYPE_BYTES)
    assert "fp16" in peaks
    assert "bf16" not in peaks  # one key for both
    if "fp8" in peaks:
        assert peaks["fp8"] / peaks["fp16"] == pytest.approx(2, rel=0.02)
    if "int8" in peaks and not listed.name.endswith("b300"):  # which gave its integer units up
        assert peaks["int8"] / peaks["fp16"] == pytest.approx(4 if listed.name == "rtx-4090" else 2, rel=0.02)


@of_all()
def test_links_are_one_way_and_no_faster_than_the_memory(listed: Listed):
    system = listed.system
    assert system.inter_gb_s <= system.intra_gb_s < system.memory_gb_s
    assert system.intra_gb_s <= 900  # what the fastest sheet gives one way


def test_what_is_unverified_or_assumed_says_so():
    assert "unverified" in SYSTEMS["ascend-910b"].system.source
    assert all("assumed" in SYSTEMS[name].system.source for name in ("l40s", "l4", "rtx-4090", "mi300x", "h100-pcie"))


def test_names_lead_to_one_system_each():
    names = [name for listed in SYSTEMS.values() for name in (listed.name, *listed.also)]
    assert len(set(names)) == len(names)
    for listed in SYSTEMS.values():
        for name in (listed.name, *listed.also):
            assert read_system(name.upper().replace("-", "_")) == listed.system


def test_a_dtype_that_a_sheet_does_not_list_is_not_planned_in():
    with pytest.raises(ValueError, match="a100-80 has no peak_tflops for fp8"):
        read_system("a100").peak_flops("fp8")


def test_an_unknown_name_says_what_is_near_and_how_to_list_all():
    message = refusal("h10")
    assert "'h10'" in message
    assert "h100" in message
    assert "octavo plan --list" in message


def test_a_file_of_plain_numbers_is_a_system_named_after_it(write: Write):
    system = read_system(write(yaml.safe_dump(PLAIN)))
    assert system == System(name="mine", source="mine.yaml", **PLAIN)


@of_all()
def test_a_system_written_down_is_read_again_as_it_was(write: Write, listed: Listed):
    system = listed.system.model_copy(
        update={"contention": {2: 1.5}, "ttft_interval": Interval(low=0.9, high=1.2), "kind": "cpu"}
    )
    assert read_system(write(yaml.safe_dump(system.model_dump()))) == system


def test_a_file_may_start_from_the_table_and_says_what_it_changes(write: Write):
    system = read_system(write("base: H100\nmemory_gb_s: 3000\nefficiency: {mfu: 0.4}\npeak_tflops: {fp16: 800}\n"))
    base = read_system("h100")
    assert system.memory_gb_s == 3000
    assert system.efficiency.mfu == 0.4
    assert system.peak_tflops == base.peak_tflops | {"fp16": 800}
    assert (system.name, system.memory_gb) == ("mine", base.memory_gb)
    assert system.source == f"{base.source}; mine.yaml changes memory_gb_s, efficiency, peak_tflops"
    assert read_system("h100") == base  # the table is as it was


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory_gb": None}, "`memory_gb` = None"),
        ({"memory_gb": -5}, "`memory_gb` = -5: Input should be greater than 0"),
        ({"memory_gb": 0}, "`memory_gb` = 0: "),
        ({"memory_gb": "much"}, "`memory_gb` = 'much'"),
        ({"memory_gb": float("nan")}, "`memory_gb` = nan"),
        ({"memory_gb": float("inf")}, "`memory_gb` = inf"),
        ({"memory_gb": True}, "`memory_gb` = True"),
        ({"memory_gb": [64]}, "`memory_gb` = [64]"),
        ({"memory_gb": 1e300}, "`memory_gb` = 1e+300"),
        ({"memory_gb": 1e-300}, "`memory_gb` = 1e-300"),
        ({"memory_gib": 64}, "`memory_gib` is no field"),
        ({"gpus_per_node": 0}, "`gpus_per_node` = 0"),
        ({"gpus_per_node": 1.5}, "`gpus_per_node` = 1.5"),
        ({"peak_tflops": {}}, "`peak_tflops` = {}"),
        ({"peak_tflops": 400}, "`peak_tflops` = 400"),
        ({"peak_tflops": {"fp17": 1}}, "`peak_tflops.fp17`"),
        ({"peak_tflops": {"fp16": -1}}, "`peak_tflops.fp16` = -1"),
        ({"efficiency": {"mfu": 1.2}}, "`efficiency.mfu` = 1.2"),
        ({"efficiency": {"speed": 1}}, "`efficiency.speed` is no field"),
        ({"efficiency": {"mfu": False}}, "`efficiency.mfu` = False"),
        ({"contention": {0: 1.0}}, "`contention`"),
        ({"contention": {"two": 1.0}}, "`contention.two`"),
        ({"ttft_interval": {"low": 3, "high": 2}}, "`ttft_interval.low` = 3"),
        ({"kind": "tpu"}, "`kind` = 'tpu'"),
        ({"source": ""}, "`source` = ''"),
        ({"base": "h101"}, "`base` = 'h101'"),
        ({"base": ["h100"]}, "`base` = ['h100']"),
    ],
)
def test_what_no_hardware_is_is_refused_by_its_name(write: Write, change: dict[str, object], said: str):
    assert said in refusal(write(yaml.safe_dump(PLAIN | change)))


def test_all_that_is_missing_is_named(write: Write):
    message = refusal(write("memory_gb: 64"))
    assert (
        "`peak_tflops` is missing; `memory_gb_s` is missing; `intra_gb_s` is missing; `inter_gb_s` is missing"
        in message
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold a YAML mapping, not None"),
        ("- 1", "must hold a YAML mapping"),
        ("memory_gb: 1\nmemory_gb: 2", "in line 2: memory_gb is there twice"),
        ("base: h100\nefficiency: {mfu: 0.1, mfu: 0.2}", "mfu is there twice"),
        ("memory_gb: [1", "is not valid YAML"),
        ("memory_gb: a: b", "in line 1"),
        ("memory_gb: 2026-99-99", "is not valid YAML"),
        ("memory_gb: \x00", "is not valid YAML"),
        ("x: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("memory_gb: 1" + "0" * 5000, "is not valid YAML"),
        ("[" * 50_000, "is not valid YAML"),
        ("a: &a {a: *a}", "is missing"),
        ("&a [*a]", "must hold a YAML mapping"),
        ("? [1, 2]\n: 3", "is not valid YAML"),
        ("1: 2", "is missing"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused(write: Write, text: str, said: str):
    message = refusal(write(text))
    assert said in message
    assert "mine.yaml" in message


def test_what_is_no_text_file_is_refused(tmp_path: Path):
    assert "is not a file" in refusal(str(tmp_path))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(str(tmp_path / "bytes.yaml"))
    large = tmp_path / "large.yaml"
    with large.open("wb") as file:
        file.truncate(1 << 30)
    assert "1,073,741,824 bytes" in refusal(str(large))


@pytest.mark.parametrize("text", ["", " ", "\0", "nowhere.yaml", "a" * 10_000, "/" * 5000, "\ud800", "x\ny"])
def test_no_name_breaks_the_look_up(text: str):
    refusal(text)


NUMBERS = st.one_of(st.floats(), st.integers(), st.booleans(), st.text(max_size=5), st.none())
FIELDS = st.dictionaries(
    st.sampled_from([*System.model_fields, "base", "other"]),
    st.one_of(NUMBERS, st.dictionaries(st.sampled_from(["fp16", "fp8", "mfu", "low", "high", "mtbf_h"]), NUMBERS)),
)


@given(fields=FIELDS, is_based=st.booleans())
def test_any_mapping_is_a_usable_system_or_one_sentence(write: Write, fields: dict[str, object], is_based: bool):
    text = write(yaml.safe_dump((PLAIN | fields) if not is_based else (fields | {"base": "h200"}), allow_unicode=True))
    try:
        system = read_system(text)
    except PlanError as error:
        assert "\n" not in str(error)
        return
    assert 0 < system.memory_gb < float("inf")
    assert all(0 < peak < float("inf") for peak in system.peak_tflops.values())
    assert system.name
    assert system.source


@given(text=st.text())
def test_any_text_in_a_file_is_a_system_or_one_sentence(write: Write, text: str):
    path = write(text.encode("utf-8", "replace").decode())
    refusal(path)  # no text of hypothesis' has the five numbers that a system needs
