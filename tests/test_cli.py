"""The command as a user runs it: what they can mend ends with one sentence and status 1, never a traceback."""

import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.model.families import make_tiny, make_tiny_tokenizer

OCTAVO = Path(sys.executable).parent / "octavo"
LIMIT_S = 60.0
ENVIRONMENT = os.environ | {"COLUMNS": "80", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole model that has no chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny("mixtral", folder)
    make_tiny_tokenizer(folder, 512)
    (folder / "tokenizer_config.json").unlink()
    return folder


@pytest.fixture
def stranger():
    """URL of a server that streams, but not as SGLang does."""

    class Stranger(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'data: {"token": {"id": 5}}\n\n')

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def octavo(*arguments):
    """(status, stdout, stderr)"""
    command = [OCTAVO, *arguments]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=LIMIT_S, check=False)
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


def assert_refused(words, *arguments):
    status, printed, complaint = octavo(*arguments)
    assert status == 1, complaint
    assert printed == ""
    assert complaint.startswith("octavo: ")
    assert complaint.count("\n") == 1
    assert words in complaint


def test_a_prompt_is_continued(tiny):
    arguments = ["generate", "The sea", "--raw", "--model", tiny, "--max-new-tokens", "4", "--threads", "1"]
    status, printed, complaint = octavo(*arguments)
    assert (status, "Traceback" in complaint) == (0, False)
    assert printed.strip()


def test_a_model_without_a_chat_template_is_named_as_such(tiny):
    assert_refused("no chat template", "generate", "hello", "--model", tiny)


def test_a_prompt_that_is_no_utf8_is_refused(tiny):
    assert_refused("not valid UTF-8", "generate", b"caf\xe9", "--raw", "--model", tiny)


def test_a_model_without_a_name_is_refused():
    assert_refused("`model` = ''", "generate", "hello", "--model", "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"applications: [\xff]", "[odd] config.yaml is not YAML"),
        (b"applications: [[1], 2]", "[odd] config.yaml is no Ray Serve config"),
        (b"applications: [{import_path: serve_app.app:build, args: [1]}]", "no mapping"),
    ],
)
def test_a_config_of_odd_content_is_refused(tmp_path, content, words):
    config = tmp_path / "[odd] config.yaml"  # what looks like markup is printed as it is
    config.write_bytes(content)
    assert_refused(words, "serve", config)


def test_a_workload_over_the_context_is_refused(tiny):
    assert_refused("context of 512", "bench", "--model", tiny, "--batch", "1", "--prefill-tokens", "511")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://["])
def test_a_server_that_is_not_there_is_no_traceback(url):
    assert_refused("could not be measured", "bench", "--url", url, "--batch", "2")


def test_a_server_that_speaks_otherwise_is_no_traceback(stranger):
    assert_refused("does not answer as SGLang", "bench", "--url", stranger, "--batch", "2")


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("http://127.0.0.1:1 does not answer", ["--url", "http://127.0.0.1:1"]),
        ("http://[ does not answer", ["--url", "http://["]),
        ("--thaw-after is for what --freeze froze", ["--thaw-after", "3"]),
        ("a node is killed, not frozen", ["--freeze", "--kill", "worker", "--kill", "node"]),
    ],
)
def test_a_drill_that_cannot_be_held_is_refused(words, arguments):
    assert_refused(words, "drill", "--yes", *arguments)


def test_a_stranger_is_not_drilled(stranger):
    assert_refused("/health answered 501", "drill", "--yes", "--url", stranger)


@pytest.mark.parametrize("arguments", [["--kill", "somebody"], ["--count", "0"], ["--streams", "0"]])
def test_a_drill_with_bad_options_is_not_understood(arguments):
    status, printed, complaint = octavo("drill", "--yes", *arguments)
    assert (status, printed, "Traceback" in complaint) == (2, "", False)
    assert arguments[0] in complaint


def test_only_the_demo_can_be_verified():
    assert_refused("--verify is for the demo model", "fetch", "someone/something", "--verify")


def test_ctrl_c_while_text_streams_ends_with_130(tiny):
    command = [OCTAVO, "generate", "The sea", "--raw", "--model", tiny, "--max-new-tokens", "500", "--threads", "1"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert b"Traceback" not in complaint
