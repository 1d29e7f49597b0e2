"""A benchmark of a running server, over HTTP: streams of SGLang's dialect, all of a batch at once."""

import asyncio
import itertools
import json
import secrets
import time
from pathlib import Path

import httpx
import msgspec

from serve_app.bench.measure import Advance, BenchError, Figures, Trace, Workload, figures

VOCABULARY = 1_000  # token ids that any served model has; a server does not tell its vocabulary
TIMEOUT_S = 600.0  # between two bytes of one stream


class RemoteBench:
    """A running server. Each run has prompts of its own: the server may still hold the KV of any that it has seen."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._seeds = itertools.count(secrets.randbits(62))

    def run(self, workload: Workload, advance: Advance) -> Figures:
        """Send one batch and wait for all of it. BenchError if the server refuses, breaks off or speaks otherwise."""
        fresh = msgspec.structs.replace(workload, seed=next(self._seeds))
        try:
            return figures(workload, asyncio.run(_run(self._url, fresh, VOCABULARY, advance)))
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise BenchError(f"{self._url} could not be measured: {str(error) or type(error).__name__}") from None

    def trace(self, workload: Workload, path: Path) -> None:
        raise BenchError("a server records no trace")


async def _run(url: str, workload: Workload, vocab_size: int, advance: Advance) -> list[Trace]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
        prompts = workload.prompts(vocab_size)
        return await asyncio.gather(*(_stream(client, prompt, workload.output_tokens, advance) for prompt in prompts))


async def _stream(client: httpx.AsyncClient, prompt: list[int], output_tokens: int, advance: Advance) -> Trace:
    sampling = {"max_new_tokens": output_tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
    trace = Trace(time.perf_counter())
    async with client.stream("POST", "/generate", json=body) as response:
        if response.status_code != 200:
            detail = (await response.aread()).decode(errors="replace")[:300]
            raise BenchError(f"{client.base_url} answered {response.status_code}: {detail}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                num_new = _num_new(line, len(trace.token_s))
                trace.add(time.perf_counter(), num_new)
                advance(num_new)
    return trace


def _num_new(line: str, num_known: int) -> int:
    """Tokens that an event adds; each event carries the count so far. BenchError if it is none of SGLang's."""
    try:
        event = json.loads(line.removeprefix("data: "))
        if "error" not in event:
            return int(event["meta_info"]["completion_tokens"]) - num_known
    except (ValueError, KeyError, TypeError):
        raise BenchError(f"the server does not answer as SGLang's /generate does: {line[:300]}") from None
    raise BenchError(f"the stream broke off: {event['error']}")
