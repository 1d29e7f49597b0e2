"""A real `serve run` as a user starts it, and the certainty that it leaves nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import yaml

ROOT = Path(__file__).parent.parent.parent
READY_S = 240.0
END_S = 60.0
BIN = Path(sys.executable).parent


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_config(folder, args, port):
    """deployments/config.yaml with other arguments and another port."""
    content = yaml.safe_load((ROOT / "deployments/config.yaml").read_text())
    content["http_options"]["port"] = port
    content["applications"][0]["args"] = args
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run_to_its_end(command, timeout_s=120.0, **environment):
    """(exit status, what it printed) of a command that is to end by itself."""
    result = subprocess.run(
        [str(BIN / command[0]), *map(str, command[1:])],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout


class Server:
    """Use as a context: ready inside, gone after."""

    end_signal = signal.SIGINT

    def __init__(self, folder, args, command=("octavo", "serve"), **environment):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "serve.log"
        config = write_config(folder, args, self.port)
        self._command = [str(BIN / command[0]), *command[1:], str(config)]
        self._environment = os.environ | environment

    def __enter__(self):
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc):
        family = [self._process, *self.processes()]
        self._process.send_signal(self.end_signal)
        try:
            self._process.wait(END_S)
        finally:
            _, alive = psutil.wait_procs(family, END_S / 4)
            for process in alive:
                process.kill()
            self._process.wait()
        assert not alive, f"left behind by {self._command}: {alive}"

    @property
    def log(self):
        return self._log.read_text()

    def processes(self, title=""):
        """Everything it started, workers and all, by what they call themselves."""
        root = psutil.Process(self._process.pid)
        found = []
        for process in root.children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def get(self, path):
        return httpx.get(self.url + path, timeout=30, trust_env=False)

    def generate(self, body, timeout_s=300.0):
        return httpx.post(f"{self.url}/generate", json=body, timeout=timeout_s, trust_env=False)

    def stats(self):
        return self.get("/health").json()["stats"]

    def wait_stats(self, wanted, limit_s=30.0):
        """The engine's statistics (sent once a second) when they are as `wanted(stats)`."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            stats = self.stats()
            if wanted(stats):
                return stats
            time.sleep(0.2)
        raise AssertionError(f"not so within {limit_s} s: {stats}")

    def wait_ended(self, num_ended):
        """Wait until so many requests have ended, however, and nothing is held for them any more."""
        return self.wait_stats(
            lambda stats: (
                sum(stats["finished_total"].values()) == num_ended
                and stats["running"] == stats["waiting"] == stats["kv_usage"] == 0
            )
        )

    def num_ended(self):
        """Requests that ended so far, once two of the engine's reports agree that nothing runs."""
        known = []
        stats = self.wait_stats(
            lambda stats: known.append(stats) or (stats["running"] == stats["waiting"] == 0 and stats in known[:-5])
        )
        return sum(stats["finished_total"].values())

    def _wait_ready(self):
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"ended before it was ready:\n{self.log}"
            try:
                if self.get("/readyz").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"not ready within {READY_S} s:\n{self.log}")
