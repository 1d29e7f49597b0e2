"""Trying a grammar out where it can do no harm: in a process of its own, before any worker sees it.

Clients write grammars, and some overflow the stack of the library that reads them or keep it busy for minutes. The
process has less stack than a worker and a limit on its time: what it survives, workers survive. It compiles the
grammar and takes some steps through it.
"""

import contextlib
import logging
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection

import msgspec
import numpy as np

from serve_app.engine.request import Grammar
from serve_app.model.grammar import LRU, MAX_GRAMMAR_BYTES, Compiler, text_mask

log = logging.getLogger(__name__)

MAX_CPU_S = 2.0  # for one grammar
MAX_MASK_CPU_S = 0.25  # for one of its steps: all streams of a worker wait for it
MAX_WAIT_S = 20.0  # for an answer, and for the process to start: there may be little CPU left
MAX_MEMORY_BYTES = 4 << 30  # address space of the process
MAX_VERDICTS = 256
STACK_BYTES = 1 << 20  # a worker's is eight times as large
NUM_WALKS, WALK_TOKENS = 2, 48

_TOO_COMPLEX = "too complex: it cannot be compiled and followed within the limits"


class GrammarsBusyError(Exception):
    """Nobody has looked at the grammar: it may be good. Try again later."""


class GrammarChecker:
    """Says what is wrong with a grammar. Verdicts are kept; threads wait for each other."""

    def __init__(self, read_tokenizer: Callable[[], str]) -> None:
        """`read_tokenizer`: gives the text of tokenizer.json. The process starts with the first grammar."""
        self._read_tokenizer = read_tokenizer
        self._verdicts: LRU[Grammar, str] = LRU(MAX_VERDICTS)
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._end: weakref.finalize[..., GrammarChecker] | None = None  # of the process

    def check(self, grammar: Grammar) -> None:
        """ValueError with what is wrong; GrammarsBusyError. It may take a second: keep it off an event loop."""
        if len(grammar.text.encode()) > MAX_GRAMMAR_BYTES:
            raise ValueError(f"longer than {MAX_GRAMMAR_BYTES} bytes")
        if not self._lock.acquire(timeout=MAX_WAIT_S):
            raise GrammarsBusyError("too many grammars are being looked at: try again later")
        try:
            verdict = self._verdicts.take(grammar)
            if verdict is None:
                verdict = self._try_out(grammar)
            self._verdicts.put(grammar, verdict)
        finally:
            self._lock.release()
        if verdict:
            raise ValueError(verdict)

    def close(self) -> None:
        """End the process. The next grammar starts another."""
        if self._end is not None:
            self._end()
        self._child = self._end = None

    def _try_out(self, grammar: Grammar) -> str:
        """The verdict. The process that dies over it, dies of it: one that somebody else ended is replaced before."""
        child = self._living()
        try:
            return child.ask(msgspec.msgpack.encode(grammar))
        except TimeoutError:
            self.close()
            raise GrammarsBusyError("it took too long to look at it: try again later") from None
        except (EOFError, OSError):
            self.close()
            return _TOO_COMPLEX

    def _living(self) -> "_Child":
        if self._child is not None and not self._child.is_alive:
            self.close()
        if self._child is None:
            try:
                self._child = _Child()
                self._end = weakref.finalize(self, self._child.close)
                self._child.ask(self._read_tokenizer().encode())
            except (EOFError, OSError) as error:
                self.close()
                log.warning("the process that looks at grammars does not start: %s", error)
                raise GrammarsBusyError("grammars cannot be looked at now: try again later") from error
        return self._child


class _Child:
    """The process, seen from here. EOFError and OSError say that it is no more, TimeoutError that it is silent."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(MAX_WAIT_S), 0))
            fd = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve_app.model.grammar_check", str(fd)],
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
            self._connection = Connection(ours.detach())

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, message: bytes) -> str:
        try:
            self._connection.send_bytes(message)
        except BlockingIOError:  # it takes nothing
            raise TimeoutError from None
        if not self._connection.poll(MAX_WAIT_S):
            raise TimeoutError
        return self._connection.recv_bytes().decode()

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


def serve(connection: Connection) -> None:
    """The process: a tokenizer comes first, then grammars; an empty answer means that there is nothing wrong."""
    tokenizer = connection.recv_bytes().decode()
    compiler = Compiler(lambda: tokenizer)
    connection.send_bytes(_verdict(lambda: compiler.tokenizer).encode())
    while True:
        grammar = msgspec.msgpack.decode(connection.recv_bytes(), type=Grammar)
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)  # its signal ends the process, wherever that is
        verdict = _verdict(lambda grammar=grammar: follow(compiler, grammar))  # type: ignore[misc]
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        connection.send_bytes(verdict.encode())


def follow(compiler: Compiler, grammar: Grammar) -> None:
    """Compile a grammar and take some random walks through it. ValueError where that cannot be, or takes too long."""
    for seed in range(NUM_WALKS):
        draw = np.random.default_rng(seed)
        matcher = compiler.matcher(grammar)
        vocab_size = compiler.tokenizer.vocab_size
        for _ in range(WALK_TOKENS):
            begun_s = time.process_time()
            mask = text_mask(matcher, vocab_size, compiler.tokenizer.eos_tokens)
            if time.process_time() - begun_s > MAX_MASK_CPU_S:
                raise ValueError(_TOO_COMPLEX)
            if not mask.any():
                break
            if not matcher.consume_token(int(draw.choice(np.flatnonzero(mask)))):
                raise ValueError(matcher.get_error())


def _verdict(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except ValueError as error:
        return _clear(str(error))
    return ""


def _clear(problem: str) -> str:
    """One line of what the library says."""
    line = " ".join(problem.replace("<non-verbose/>", "").split())[:300]
    return "nothing can satisfy it" if line.startswith("NoExtension") else line or _TOO_COMPLEX


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)

    def run() -> None:
        with contextlib.suppress(EOFError, OSError):  # whoever asked has gone
            serve(Connection(int(sys.argv[1])))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


if __name__ == "__main__":
    _main()
