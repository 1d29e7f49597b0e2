"""The report is one page that needs nothing else, says all that was found, and takes nobody's words for markup."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import PlanError
from serve_app.plan.answer import Answer, answer
from serve_app.plan.audit import Finding, audit, read_declared
from serve_app.plan.html import write_report
from serve_app.plan.loss import after
from serve_app.plan.question import Question
from serve_app.plan.report.figures import nines, percent
from serve_app.plan.report.gpu_map import MOST, blocks, draw_taken
from serve_app.plan.report.markup import tag
from serve_app.plan.report.page import page
from serve_app.plan.report.scatter import axis
from serve_app.plan.report.style import STYLE
from serve_app.plan.workload import Lengths, Objective, Workload
from tests.plan.cases import FP16, R10B, REFERENCE, SEED
from tests.plan.losing import case

WORKLOAD = Workload(Lengths.fixed(10240), Lengths.fixed(128), objective=Objective(ttft_s=10.0))
QUESTION = Question("reference-10b", R10B, FP16, REFERENCE, WORKLOAD, 32, layout=SEED)
DECLARED = Path(__file__).parent / "parallel-strategy.yaml"
EMPTY = {"meta", "input", "br"}  # of the tags that are used, those without an end

# What the loss of GPU 13 (stage 1, replica 1, shard 1 of TP4 PP4 DP2) makes of the GPUs: its replica rests, the other
# stands still for a moment.
OF_13 = {gpu: "rests" if gpu % 8 >= 4 else "pauses" for gpu in range(32)} | {13: "lost"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    children: list["Element | str"] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def walk(self) -> Iterator["Element"]:
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def all(self, name: str = "", kind: str = "") -> list["Element"]:
        return [found for found in self.walk() if name in ("", found.name) and (not kind or kind in found.classes)]

    def with_id(self, anchor: str) -> "Element":
        (found,) = (found for found in self.walk() if found.attributes.get("id") == anchor)
        return found


class Tree(HTMLParser):
    """Every tag is ended, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.opened = [self.root]
        self.feed(text)
        self.close()
        assert self.opened == [self.root], f"not ended: {[element.name for element in self.opened[1:]]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, dict(attrs))
        self.opened[-1].children.append(element)
        if tag not in EMPTY:
            self.opened.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop().name == tag

    def handle_data(self, data: str) -> None:
        self.opened[-1].children.append(data)


def parse(text: str) -> Element:
    return Tree(text).root


@cache
def answered() -> Answer:
    return answer(QUESTION)


@cache
def findings() -> tuple[Finding, ...]:
    return tuple(audit(read_declared(DECLARED)))


@cache
def made() -> tuple[str, Element]:
    text = page(answered(), findings(), 13)
    return text, parse(text)


def test_the_page_is_well_formed_and_each_id_is_there_once() -> None:
    text, root = made()
    ids = [found for element in root.walk() if (found := element.attributes.get("id"))]
    assert text.startswith("<!DOCTYPE html>\n")
    assert len(ids) == len(set(ids)) > 40
    targets = [element.attributes["for"] for element in root.all("label")]
    targets += [(element.attributes["href"] or "")[1:] for element in root.all("a")]
    assert set(targets) <= set(ids)


def test_the_page_asks_for_nothing_from_elsewhere_and_has_no_script() -> None:
    root = made()[1]
    assert not {element.name for element in root.walk()} & {"script", "link", "img", "iframe", "object", "use", "base"}
    for element in root.walk():
        assert "src" not in element.attributes and "srcset" not in element.attributes
        assert not [name for name in element.attributes if name.startswith("on")]
        assert (element.attributes.get("href") or "#").startswith("#")
    styles = "".join(element.text for element in root.all("style")) + "".join(
        element.attributes.get("style") or "" for element in root.walk()
    )
    assert "@import" not in styles and "url(" not in styles


def test_what_a_user_named_is_never_markup() -> None:
    evil = "<script>alert('x')</script> & \"</title>\x00\ud800"
    system = REFERENCE.model_copy(update={"name": evil, "source": evil})
    found = answer(replace(QUESTION, model=evil, system=system))
    finding = Finding(evil, evil, evil, evil, "does not hold", evil)
    text = page(found, [finding], None)
    root = parse(text)
    text.encode("utf-8")
    assert not root.all("script")
    shown = "<script>alert('x')</script> & \"</title>\ufffd\ufffd"
    assert root.all("h1")[0].text == f"{shown} on 32 GPUs of {shown}"
    assert root.with_id("audit").text.count(shown) == 5
    assert "&amp;lt;" not in text  # nor is it escaped twice


@given(st.text())
def test_any_text_comes_through_as_text(value: str) -> None:
    root = parse(tag("p", value, title=value))
    found = root.children[0]
    assert isinstance(found, Element) and found.name == "p"
    kept = "".join("\ufffd" if (ord(c) < 32 and c not in "\t\n\r") or ord(c) == 127 else c for c in value)
    assert found.text == kept and found.attributes["title"] == kept


def test_every_layout_and_every_phase_is_told() -> None:
    found, root = answered(), made()[1]
    rows = {row.text for row in root.with_id("layouts").all("th")}
    for candidate in found.found.candidates:
        assert any(row.startswith(str(candidate.deployment)) for row in rows)
    for name in ("wide", "narrow"):
        (plot,) = root.all("svg", name)
        assert len(plot.all("circle")) == len(found.found.candidates)
    refused = root.with_id("layouts").all("details")[-1].text
    for rejected in found.found.rejected:
        assert str(rejected.deployment) in refused and rejected.reason in refused
    panel = root.all(kind="panel-0")[0]
    phases = [row.text for row in panel.all("th") if row.attributes.get("scope") == "row"]
    budget = found.recovery
    assert phases == [phase.name for phase in (*budget.failover, *budget.restore)]
    assert {op.name for op in (*found.prompt_ops(), *found.decode_ops())} == {
        row.text for row in root.with_id("operations").all("th") if row.attributes.get("scope") == "row"
    }
    told = root.with_id("audit").text
    assert all(finding.row in told and finding.reading in told for finding in findings())


def test_the_map_of_the_loss_of_gpu_13_has_each_gpu_as_what_becomes_of_it() -> None:
    root = parse(draw_taken(answered().story(13).state))
    gpus = root.all("span", "gpu")
    assert {int(gpu.text): gpu.classes[1] for gpu in gpus} == OF_13
    assert len(gpus) == 32


def test_choosing_gpu_13_colours_the_map_alike_by_its_rules_of_style() -> None:
    root = made()[1]
    (pick,) = root.all(kind="pick")
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", pick.all("style")[0].text)
    looks = {"lost": "var(--lost)", "rests": "var(--rests)", "pauses": "var(--pauses)"}
    found = {}
    for label in pick.all("label", "gpu"):
        for selectors, style in rules:
            chosen = [one for one in selectors.strip().split(",") if one.startswith("#gpu-13:checked~.taken .")]
            if any(one.rsplit(".", 1)[1] in label.classes for one in chosen):
                found[int(label.text)] = next(fate for fate, look in looks.items() if look in style)
    assert found == OF_13
    assert pick.with_id("gpu-13").attributes.get("checked", "no") is None  # it is chosen from the beginning
    (story,) = pick.all(kind="story-13")
    assert "GPU 13 is on node 1, in cell 0: stage 1, replica 1, shard 1." in story.text


def test_the_map_of_each_loss_has_as_many_gpus_as_there_are() -> None:
    root, states = made()[1], answered().losses.states
    for index, state in enumerate(states):
        (panel,) = root.all(kind=f"panel-{index}")
        gpus = panel.all("span", "gpu")
        assert len(gpus) == 32
        assert {int(gpu.text) for gpu in gpus if "lost" in gpu.classes} == set(state.gpus)


def test_of_a_large_deployment_the_hit_cells_are_drawn_and_the_page_says_so() -> None:
    layout = replace(SEED, cells=32, spares=1)
    found = answer(replace(QUESTION, num_gpus=None, workload=WORKLOAD, layout=layout, spares=1))
    root = parse(page(found, (), 40))
    for index, state in enumerate(found.losses.states):
        (panel,) = root.all(kind=f"panel-{index}")
        cells = {int(title.text.split()[1]) for title in panel.all("h4")}
        assert cells == {cell.cell for cell in state.cells}
        assert f"Not drawn: {1024 - 32 * len(cells):,} GPUs" in panel.text
    assert "GPU 40 is on node 5, in cell 1: stage 1, replica 0, shard 0." in root.all(kind="panel")[-1].text


def test_of_a_cell_too_large_to_draw_the_stage_and_the_replica_that_lost_somebody_are() -> None:
    state = after(*case(replace(SEED, dp=128)), [1500])
    drawn = blocks(state)
    assert sum(len(block.replicas) for block in drawn) * 4 <= MOST
    seat = state.cells[0].seats[0]
    assert any(block.stage == seat.stage and seat.replica in block.replicas for block in drawn)


def test_the_same_answer_makes_the_same_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one.html", tmp_path / "other.html"
    write_report(one, answer(QUESTION), findings(), killed=13)
    write_report(other, answer(QUESTION), findings(), killed=13)
    assert one.read_bytes() == other.read_bytes() == made()[0].encode("utf-8")


def test_a_file_that_cannot_be_written_and_a_gpu_that_is_not_there_are_said(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"gone.*report\.html cannot be written"):
        write_report(tmp_path / "gone" / "report.html", answered())
    with pytest.raises(PlanError, match="there is no GPU 99"):
        write_report(tmp_path / "report.html", answered(), killed=99)
    assert not (tmp_path / "report.html").exists()


def test_what_is_not_kept_is_said_first_and_a_missing_section_is_not_linked() -> None:
    hard = replace(WORKLOAD, objective=Objective(tpot_ms=0.001))
    root = parse(page(answer(replace(QUESTION, workload=hard)), (), None))
    (verdict,) = root.all("header")[0].all("p", "verdict")
    assert verdict.text.startswith("✕ Objective not kept: TPOT")
    links = {link.attributes["href"] for link in root.all("a")}
    assert "#audit" not in links and "#admission" not in links


def test_each_drawing_and_table_says_what_it_is() -> None:
    root = made()[1]
    for plot in (svg for svg in root.all("svg") if "aria-hidden" not in svg.attributes):
        assert plot.all("title")[0].text and plot.all("desc")[0].text
    for table in root.all("table"):
        assert table.all("caption")[0].text
        assert all(head.attributes.get("scope") for head in table.all("th"))


def test_the_loss_of_a_gpu_is_shown_first_where_there_are_spares_too() -> None:
    root = parse(page(answer(replace(QUESTION, num_gpus=36, layout=None, spares=2)), (), None))
    (choice,) = root.all(kind="choice")
    buttons = [element for element in choice.all("input") if element.attributes["name"] == "loss"]
    labels = {label.attributes["for"]: label.text for label in choice.all("label", "button")}
    assert [labels[one.attributes["id"]] for one in buttons if "checked" in one.attributes] == ["one GPU"]
    assert "Nobody waits" in root.all(kind="panel-0")[0].text  # of a spare


# -- figures and axes -----------------------------------------------------------------------------------------------


def test_shares_near_one_show_what_is_missing() -> None:
    assert [nines(share) for share in (1.0, 0.5, 0.999, 0.9999981, 0.0)] == [
        "100 %",
        "50.0 %",
        "99.90 %",
        "99.99981 %",
        "0.0 %",
    ]
    assert [percent(share) for share in (1.0, 0.5, 0.0123, 3.29e-7, 0.0)] == [
        "100 %",
        "50 %",
        "1.23 %",
        "0.0000329 %",
        "0 %",
    ]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_an_axis_shows_all_its_values_and_a_tick_or_more(values: list[float]) -> None:
    found = axis("x", values, 8)
    assert all(0.0 <= found.at(value) <= 1.0 for value in values)
    assert all(found.low <= tick <= found.high * (1 + 1e-9) for tick in found.ticks)
    assert 1 <= len(found.ticks) <= 14
    assert found.is_log == (max(values) / min(values) > 20)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(digit * 2 for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(theme: int) -> None:
    """WCAG 2.1, 1.4.3: a contrast of 4.5 at least."""
    roots = re.findall(r":root\{([^}]*)\}", STYLE)
    assert len(roots) == 2
    colours = dict(re.findall(r"--([a-z-]+):(#[0-9a-f]{3,6})\b", roots[theme]))
    pairs = [(text, ground) for text in ("ink", "muted", "accent", "good", "bad") for ground in ("sheet", "ground")]
    pairs += [("ink", fate) for fate in ("rests", "pauses", "serves")] + [("on-lost", "lost"), ("sheet", "accent")]
    for text, ground in pairs:
        light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text} on {ground}"


def test_a_browser_shows_it_without_a_complaint(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here to look at the page with")
    path = tmp_path / "report.html"
    write_report(path, answered(), findings(), killed=13)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    log = ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND"]
    run = subprocess.run(
        [browser, *options, *log, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    complaints = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
    # the browser has mended nothing: it has as many elements as were written
    shown, written = parse(run.stdout), made()[1]
    assert len(list(shown.walk())) == len(list(written.walk()))
