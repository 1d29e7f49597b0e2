"""A benchmark of a running server, over HTTP: streams of SGLang's dialect, all of a batch at once."""

import asyncio
import time

import httpx

from serve_app.bench.measure import Figures, Trace, Workload, figures
from serve_app.errors import OctavoError

TIMEOUT_S = 600.0  # between two bytes of one stream


class BenchError(OctavoError):
    """The server could not be measured."""


def run_remote(url: str, workload: Workload, vocab_size: int) -> Figures:
    """Send one batch and wait for all of it. BenchError if the server refuses or breaks off."""
    return figures(workload, asyncio.run(_run(url, workload, vocab_size)))


async def _run(url: str, workload: Workload, vocab_size: int) -> list[Trace]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
        prompts = workload.prompts(vocab_size)
        try:
            return await asyncio.gather(*(_stream(client, prompt, workload.output_tokens) for prompt in prompts))
        except httpx.HTTPError as error:
            raise BenchError(f"{url} could not be measured: {error or type(error).__name__}") from None


async def _stream(client: httpx.AsyncClient, prompt: list[int], output_tokens: int) -> Trace:
    sampling = {"max_new_tokens": output_tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
    trace = Trace(time.perf_counter())
    async with client.stream("POST", "/generate", json=body) as response:
        if response.status_code != 200:
            detail = (await response.aread()).decode(errors="replace")[:300]
            raise BenchError(f"{client.base_url} answered {response.status_code}: {detail}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                trace.add(time.perf_counter(), _num_new(line, len(trace.token_s)))
    return trace


def _num_new(line: str, num_known: int) -> int:
    """Tokens that an event adds; each event carries the count so far."""
    event = httpx.Response(200, content=line[len("data: ") :]).json()
    if "error" in event:
        raise BenchError(f"the stream broke off: {event['error']}")
    return int(event["meta_info"]["completion_tokens"]) - num_known
