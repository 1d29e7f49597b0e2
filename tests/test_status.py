"""`octavo status`: the picture of a cell can be read at any width, and what cannot be drawn is one sentence."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from serve_app.status import figures
from serve_app.status.ask import StatusError
from serve_app.status.draw import draw
from serve_app.status.heat import heat_bar
from serve_app.status.show import show
from tests.test_cli import ENVIRONMENT, LIMIT_S, OCTAVO, assert_refused, octavo
from tests.views import MIB, make_health, make_view

URL = "http://octavo:8000"
REFERENCE = (4, 4, 2)  # TP, PP, DP


def draw_text(view, width, *, health=None, experts=False, **console):
    """What would be printed."""
    printer = Console(width=width, file=io.StringIO(), **console)
    printer.print(draw(URL, health or make_health(), view, experts=experts))
    return printer.file.getvalue()


def cells_of(text):
    """Each worker's ratio and memory."""
    return re.findall(r"(\d[.\d]+x) +(\d[.\d]*[MG])", text)


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 2, 2), REFERENCE, (2, 16, 1), (8, 2, 2)])
@pytest.mark.parametrize("experts", [False, True])
def test_every_worker_is_drawn_and_no_line_is_wider_than_the_terminal(layout, width, experts):
    text = draw_text(make_view(*layout), width, experts=experts)
    assert len(cells_of(text)) == layout[0] * layout[1] * layout[2]
    assert all(cell_len(line) <= width for line in text.splitlines())
    assert "…" not in text
    assert "\x1b" not in text


def test_the_reference_layout_fits_a_small_terminal():
    assert len(draw_text(make_view(*REFERENCE), 80).splitlines()) < 24


@pytest.mark.parametrize("width", [1, 10, 30])
def test_a_terminal_that_is_too_narrow_is_no_error(width):
    assert draw_text(make_view(*REFERENCE), width, experts=True)


def test_colour_only_repeats_what_the_text_says():
    view = make_view(*REFERENCE, empty={(2, 5)})
    coloured = draw_text(view, 120, force_terminal=True, color_system="standard")
    assert {"\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[36m"} <= set(re.findall(r"\x1b\[\d+m", coloured))
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == draw_text(view, 120)


def test_a_terminal_without_unicode_gets_bars_too():
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(width=80, file=output).print(draw(URL, make_health(), make_view(*REFERENCE)))
    output.flush()
    assert b"####. 1.78x 250M" in output.buffer.getvalue()


def test_the_head_says_what_holds_for_the_whole_cell():
    head = draw_text(make_view(*REFERENCE, num_nodes=2), 80).splitlines()[:3]
    assert head == [
        "http://octavo:8000 is ready",
        "epoch 7 | TP 4 x PP 4 x DP 2 | 32 of 32 workers | 2 nodes | 6.7G resident",
        "12 requests running, 3 waiting | KV 41% of 8,192 pages",
    ]


def test_a_stage_shows_its_layers_its_imbalance_and_what_the_offer_makes_of_it():
    rows = [line.split() for line in draw_text(make_view(1, 2, 2), 80).splitlines()]
    assert ["layers", "0-3", "layers", "4-7"] in rows
    assert ["tokens", "3000", "3000"] in rows
    assert ["busiest", "1.33x", "1.33x"] in rows
    assert ["offered", "1.02x", "1.02x"] in rows


def test_a_cell_that_is_not_ready_says_why():
    text = draw_text(make_view(1, 1, 1), 80, health=make_health(ready=False, reason="[w0.0.0#1] is awaited"))
    assert f"{URL} is not ready: [w0.0.0#1] is awaited\n" in text  # what looks like markup is text
    text = draw_text(make_view(1, 1, 1), 80, health=make_health(live=False, ready=False, reason="silent for 7 s"))
    assert f"{URL} is unreachable: silent for 7 s\n" in text


def test_what_a_server_says_does_not_steer_the_terminal():
    health = make_health(ready=False, reason="\x1b[2J\x07")
    assert not set("\x1b\x07") & set(draw_text(make_view(1, 1, 1), 80, health=health))


def test_an_empty_seat_is_seen():
    text = draw_text(make_view(*REFERENCE, empty={(0, 0), (2, 5)}), 80, experts=True)
    assert text.count("empty seat") == 2
    assert len(cells_of(text)) == 30
    assert "30 of 32 workers" in text
    assert "empty: r1 s1" in text


def test_a_seat_that_the_server_does_not_name_is_empty():
    view = make_view(1, 2, 2)
    stages = [view.stages[0], msgspec.structs.replace(view.stages[1], workers=view.stages[1].workers[:1])]
    assert draw_text(msgspec.structs.replace(view, stages=stages), 80).count("empty seat") == 1


def test_a_cell_without_load_is_idle_not_balanced():
    text = draw_text(make_view(1, 2, 2, idle=True), 80)
    assert text.count("idle") == 4
    assert ["busiest", "-", "-"] in [line.split() for line in text.splitlines()]


def test_experts_are_listed_by_who_holds_them():
    rows = [line.split() for line in draw_text(make_view(1, 2, 2), 80, experts=True).splitlines()]
    assert ["w0.1.0#2", "L0-3:1,3", "L0:0", "L1:1"] in rows


def test_nodes_are_told_apart_where_there_are_several():
    assert "11111111" in draw_text(make_view(1, 2, 2, num_nodes=2), 80, experts=True)
    assert "00000000" not in draw_text(make_view(1, 2, 2), 80, experts=True)


@given(st.floats(0, 100), st.integers(1, 30), st.booleans())
def test_a_bar_is_as_wide_as_it_should_be_and_full_from_twice_the_mean_on(ratio, width, ascii_only):
    bar = heat_bar(ratio, width, ascii_only=ascii_only).plain
    assert len(bar) == width
    assert (set(bar) <= {"█", "#"}) or ratio < 2


@given(st.integers(1, 30), st.data())
def test_more_load_is_never_a_shorter_bar(width, data):
    order = " ▏▎▍▌▋▊▉█"
    ratios = sorted(data.draw(st.lists(st.floats(0, 3), min_size=2)))
    lengths = [sum(order.index(char) for char in heat_bar(ratio, width).plain) for ratio in ratios]
    assert lengths == sorted(lengths)
    assert all(length > 0 for length, ratio in zip(lengths, ratios, strict=True) if ratio > 0)


@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 40))))
def test_a_list_of_experts_says_exactly_who_is_held(pairs):
    assert read_held(figures.held(pairs)) == pairs


def read_held(text):
    def read(ranges):
        ends = [[int(end) for end in part.split("-")] for part in ranges.split(",")]
        return [number for first, *last in ends for number in range(first, last[0] + 1 if last else first + 1)]

    groups = [group.removeprefix("L").split(":") for group in text.split()]
    return {(layer, expert) for layers, experts in groups for layer in read(layers) for expert in read(experts)}


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(0, "-"), (1, "0M"), (186 * MIB, "186M"), (999 * MIB, "999M"), (1000 * MIB, "1.0G"), (38 << 30, "38G")],
)
def test_memory_is_short(num_bytes, shown):
    assert figures.memory(num_bytes) == shown


@given(st.floats(0, 999), st.integers(0, 999 * 10**12))
def test_figures_keep_to_their_width(ratio, number):
    assert len(figures.times(ratio)) <= 5
    assert len(figures.short(number)) <= 5


# -- the command ------------------------------------------------------------------------------------------------------


def encode(health, view):
    return {"/health": (200, msgspec.json.encode(health)), "/admin/placement": (200, msgspec.json.encode(view))}


REFUSAL = (503, b'{"status":"unavailable","reason":"there is no router yet"}')
AWAITING = (200, msgspec.json.encode(make_health(ready=False, reason="24 of 32 CPUs are missing")))

READY = (200, msgspec.json.encode(make_health(reason="ready")))  # the engine's word for it


@contextmanager
def serving(replies):
    """URL of a server that answers as `replies` says: path -> (status, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = replies.get(self.path, (404, b"{}"))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_command_draws_a_cell_ready_or_not():
    health = make_health(ready=False, reason="worker w0.0.0#1 is awaited")
    with serving(encode(health, make_view(1, 2, 2))) as url:
        status, printed, complaint = octavo("status", "--url", url)
    assert (status, complaint) == (0, "")
    assert f"{url} is not ready: worker w0.0.0#1 is awaited" in printed
    assert len(cells_of(printed)) == 4


def test_json_is_what_the_server_says():
    replies = encode(make_health(), make_view(*REFERENCE))
    with serving(replies) as url:
        status, printed, complaint = octavo("status", "--url", url, "--json")
    assert (status, complaint) == (0, "")
    said = {
        name: json.loads(replies[path][1]) for name, path in (("health", "/health"), ("placement", "/admin/placement"))
    }
    assert json.loads(printed) == said


@pytest.mark.parametrize(
    ("replies", "words"),
    [
        ({}, "does not answer as an Octavo server does, or not yet: status 404"),
        ({"/health": (200, b"ok"), "/admin/placement": REFUSAL}, "does not answer as an Octavo server does"),
        ({"/health": (200, b'{"live":"\xff"}'), "/admin/placement": REFUSAL}, "does not answer as an Octavo server"),
        (encode(make_health(), {"epoch": 1}), "does not answer as an Octavo server does"),
        (
            {"/health": AWAITING, "/admin/placement": REFUSAL},
            "is not ready (24 of 32 CPUs are missing), and cannot say who holds what: there is no router yet",
        ),
        (
            {"/health": READY, "/admin/placement": REFUSAL},
            "is ready, but cannot say who holds what: there is no router yet",
        ),
    ],
)
def test_a_server_without_a_cell_to_show_is_one_sentence(replies, words):
    with serving(replies) as url:
        assert_nothing_to_show(url, words)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[", "http://\ud800", "127.0.0.1:8000", ""])
def test_a_server_that_is_not_there_is_one_sentence(url):
    assert_nothing_to_show(url, f"{url} ")


def assert_nothing_to_show(url, words):
    with pytest.raises(StatusError, match=re.escape(words)) as caught:
        show(url, experts=False)
    assert "\n" not in str(caught.value)


def test_the_command_ends_with_one_sentence_and_status_1():
    assert_refused("http://127.0.0.1:1 does not answer", "status", "--url", "http://127.0.0.1:1")
    assert_refused("--watch redraws a terminal", "status", "--watch")
    assert_refused("leave --watch", "status", "--watch", "--json")


def test_a_watch_goes_on_without_an_answer_until_ctrl_c_and_ends_quietly():
    replies = encode(make_health(), make_view(1, 2, 2))
    master, slave = pty.openpty()
    environment = ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "200", "LINES": "40"}
    with serving(replies) as url:
        command = [OCTAVO, "status", "--watch", "--url", url]
        process = subprocess.Popen(command, env=environment, stdout=slave, stderr=subprocess.PIPE)
        os.close(slave)
        try:
            read_until(master, b"layers 4-7")
            replies["/admin/placement"] = REFUSAL
            read_until(master, b"there is no router yet.*layers 4-7")
            replies.update(encode(make_health(ready=False, reason="a new epoch"), make_view(1, 2, 2)))
            read_until(master, b"not ready.*a new epoch")
            process.send_signal(signal.SIGINT)
            read_until(master, None)
            process.wait(LIMIT_S)
        finally:
            process.kill()
            _, complaint = process.communicate()
            os.close(master)
    assert (process.returncode, complaint) == (0, b"")


def read_until(terminal, pattern):
    """What is printed until `pattern` has been; until the end if None."""
    seen, deadline_s = b"", time.monotonic() + LIMIT_S
    while pattern is None or not re.search(pattern, seen, re.DOTALL):
        assert time.monotonic() < deadline_s, f"no {pattern} within {LIMIT_S} s: {seen[-4000:]}"
        try:
            seen += os.read(terminal, 1 << 16)  # a watch prints something each second
        except OSError:  # Linux says so when the other side is closed
            assert pattern is None, f"ended before {pattern}: {seen}"
            break
    return seen
