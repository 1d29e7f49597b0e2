"""`octavo bench serve` as a user runs it, against Octavo's own application."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.settings import parse_rate
from serve_app.cli import app
from serve_app.errors import OctavoError

OCTAVO = Path(sys.executable).parent / "octavo"
LIMIT_S = 120.0
ENVIRONMENT = os.environ | {"COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
SMALL = ["--prompt-tokens", "4:40", "--output-tokens", "2:6", "--vocab", "10:400"]


def command(server, *arguments):
    host, port = server
    return ["bench", "serve", "--url", f"http://{host}:{port}", *SMALL, *map(str, arguments)]


async def start(arguments):
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(OCTAVO, *arguments, env=ENVIRONMENT, stdout=pipe, stderr=pipe)


async def end_of(process):
    """(status, stdout, stderr)"""
    printed, complaint = await asyncio.wait_for(process.communicate(), LIMIT_S)
    return process.returncode, printed.decode(), complaint.decode()


async def octavo(server, *arguments):
    return await end_of(await start(command(server, *arguments)))


@pytest.mark.anyio
async def test_rates_run_one_after_another_against_a_capacity_that_is_measured_first(server, tmp_path):
    measured = ["--rate", "0.5x", "--rate", "20", "--capacity-streams", "4", "--capacity-s", "0.3"]
    rest = ["--duration", "0.5", "--max-requests", "60", "--plot", tmp_path / "plot.png", "--json"]
    status, printed, complaint = await octavo(server, *measured, *rest)
    assert status == 0, complaint
    report = json.loads(printed)
    assert (report["attainment"], report["refused"], report["errors"]) == (1.0, 0, 0)
    assert report["capacity"]["requests_per_s"] > 0
    assert "capacity: " in complaint
    assert [run["rate"] for run in report["runs"]] == ["0.5x", "20"]
    assert report["runs"][0]["rate_per_s"] == report["capacity"]["requests_per_s"] / 2
    assert max(run["goodput_ratio"] for run in report["runs"]) == 1.0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.anyio
async def test_a_recorded_run_can_be_replayed_and_drawn_beside_the_first(server, tmp_path):
    trace, first, plot = tmp_path / "trace.jsonl", tmp_path / "first.json", tmp_path / "plot.png"
    status, printed, complaint = await octavo(
        server,
        "--rate",
        "2x",
        "--capacity",
        "10",
        "--duration",
        "0.4",
        "--pattern",
        "burst",
        "--record",
        trace,
        "--json",
    )
    assert status == 0, complaint
    assert "capacity: " not in complaint  # it was given
    first.write_text(printed)
    status, table, complaint = await octavo(server, "--trace", trace, "--plot", plot, "--compare", first)
    assert status == 0, complaint
    num_sent = json.loads(printed)["runs"][0]["sent"]
    assert len(trace.read_text().splitlines()) == num_sent
    assert f" {num_sent} " in table
    assert plot.exists()


@pytest.mark.anyio
async def test_a_failed_request_ends_with_status_1_and_says_how(world, server):
    world.engine.failing_after = 1
    status, printed, _ = await octavo(server, "--rate", "20", "--duration", "0.3", "--pattern", "uniform")
    assert status == 1
    assert "broke off" in printed


@pytest.mark.anyio
async def test_ctrl_c_prints_what_is_known_and_ends_with_130(world, server):
    world.engine.running.clear()
    process = await start(command(server, "--rate", "20", "--pattern", "uniform", "--duration", "60", "--json"))
    while len(world.engine.requests) < 3:
        world.engine.submitted.clear()
        await world.engine.submitted.wait()
    process.send_signal(signal.SIGINT)
    status, printed, complaint = await end_of(process)
    world.engine.running.set()
    assert status == 130
    assert "Traceback" not in complaint
    report = json.loads(printed)
    assert report["interrupted"]
    (run,) = report["runs"]
    assert run["unfinished"] == run["sent"] >= 3
    assert run["attainment"] is None


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("--rate fast is no rate", ["--rate", "fast"]),
        ("--rate 0x is no rate", ["--rate", "0x"]),
        ("--prompt-tokens 9:3 is no range", ["--prompt-tokens", "9:3"]),
        ("--duration 0 must be above 0", ["--duration", "0"]),
        ("--hang-up-s 5 is below the objective", ["--hang-up-s", "5"]),
        ("--record writes the requests of one run", ["--record", "x", "--rate", "1", "--rate", "2"]),
        ("--plot cannot be written", ["--plot", "nowhere/plot.png"]),
        ("--compare draws another run beside", ["--compare", "x.json"]),
        ("x.json cannot be read", ["--compare", "x.json", "--plot", "y.png"]),
        ("x.jsonl cannot be read", ["--trace", "x.jsonl"]),
        ("Say --yes", ["--url", "http://192.0.2.1:8000"]),
        ("http://127.0.0.1:1 does not answer", []),
    ],
)
def test_a_load_test_that_cannot_be_run_is_refused_in_one_sentence(words, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "serve", "--url", "http://127.0.0.1:1", *arguments])
    assert isinstance(result.exception, OctavoError)
    assert words in str(result.exception)
    assert result.stdout == ""


def test_options_before_the_word_serve_are_refused():
    result = CliRunner().invoke(app, ["bench", "--url", "http://127.0.0.1:1", "serve"])
    assert isinstance(result.exception, OctavoError)
    assert "--url is for `octavo bench` alone" in str(result.exception)


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-1", "1e99", "2xx"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(BenchError, match="is no rate"):
        parse_rate(text)
