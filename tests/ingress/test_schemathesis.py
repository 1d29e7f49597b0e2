"""Requests made from /openapi.json, good ones and bad ones: each is answered as the document says, none with a fault.

Two hundred by default. `OCTAVO_SCHEMA_CASES=2200` makes so many in all; with `-s` the seed and the counts are shown.
"""

import asyncio
import math
import os
import threading
from collections import Counter
from contextlib import asynccontextmanager, contextmanager, suppress

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from serve_app.ingress.terms import TIMEOUT_HEADER
from tests.ingress.conftest import open_world, serving
from tests.ingress.echo_engine import END_TOKEN

SEED = 20_260_801
NUM_CASES = int(os.environ.get("OCTAVO_SCHEMA_CASES", "200"))
TIMEOUT_S = 30.0
LOOK_S = 0.01
# Of all cases: more where there is more to get wrong. Each share is half good requests and half bad ones, if there can
# be bad ones.
SHARES = {
    "POST /generate": 0.22,
    "POST /v1/chat/completions": 0.22,
    "POST /v1/completions": 0.16,
    "POST /tokenize": 0.1,
    "POST /detokenize": 0.06,
    "POST /admin/operations": 0.1,
    "POST /abort_request": 0.06,
    "GET /admin/operations/{name}": 0.04,
    "GET /v1/models/{model}": 0.03,
    "GET /admin/events": 0.03,
}
NEVER_BAD = {"GET /admin/operations/{name}", "GET /v1/models/{model}"}  # any text is a name
PLAIN = {  # nothing can be asked of them
    "GET /v1/models",
    "GET /livez",
    "GET /readyz",
    "GET /health",
    "GET /metrics",
    "GET /admin/placement",
    "GET /admin/processes",
    "GET /admin/pace",
    "GET /admin/operations",
}


def modes_of(label):
    return [GenerationMode.POSITIVE] if label in NEVER_BAD else list(GenerationMode)


def no_server_error(context, response, case):
    """An answer that is late for the client's own taste is no fault of the server's."""
    if response.status_code != 504 or TIMEOUT_HEADER not in (case.headers or {}):
        not_a_server_error(context, response, case)


CHECKS = [
    no_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]


@asynccontextmanager
async def served_world(tokenizer):
    """One whose model ends its answers soon, and whose cell does what it is ordered; yields it and its address."""
    async with open_world(tokenizer) as world:
        world.engine._babble = [*tokenizer.encode(" and the leaf"), END_TOKEN]

        async def look():
            while True:
                world.engine.look()
                await asyncio.sleep(LOOK_S)

        looking = asyncio.ensure_future(look())
        async with serving(world) as address:
            yield world, "http://{}:{}".format(*address)
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking
        world.engine.assert_idle()


@contextmanager
def in_a_thread(tokenizer):
    """The address of such a world, which is idle again in the end."""
    addresses, closing = [], asyncio.Event()
    ready = threading.Event()
    failures = []
    loop = asyncio.new_event_loop()

    async def serve():
        async with served_world(tokenizer) as (_, url):
            addresses.append(url)
            ready.set()
            await closing.wait()

    def run():
        try:
            loop.run_until_complete(serve())
        except BaseException as failure:
            failures.append(failure)
        finally:
            ready.set()
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(TIMEOUT_S)
    try:
        yield addresses[0]
    finally:
        loop.call_soon_threadsafe(closing.set)
        thread.join(TIMEOUT_S)
    assert not failures, failures


@pytest.fixture
def url(tokenizer):
    with in_a_thread(tokenizer) as url:
        yield url


def ask(url, label, mode, num_cases):
    """Statuses of the answers to so many requests, all of them as the document says."""
    api = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operation = next(each.ok() for each in api.get_all_operations() if each.ok().label == label)
    statuses = Counter()
    session = requests.Session()

    @seed(SEED)
    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def each(case):
        response = case.call(session=session, timeout=TIMEOUT_S)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    with session:
        each()
    print(f"seed {SEED}, {label}, {mode.value}: {sum(statuses.values())} requests, {dict(sorted(statuses.items()))}")
    return statuses


@pytest.mark.parametrize(
    ("label", "mode"),
    [(label, mode) for label in SHARES for mode in modes_of(label)],
    ids=lambda value: value if isinstance(value, str) else value.value,
)
def test_requests_made_from_the_document_are_answered_as_it_says(url, label, mode):
    num_cases = math.ceil(NUM_CASES * SHARES[label] / len(modes_of(label)))
    statuses = ask(url, label, mode, num_cases)
    assert sum(statuses.values()) >= num_cases
    if mode is GenerationMode.NEGATIVE and num_cases >= 20:  # of a few, all may happen to be harmless
        assert any(400 <= status < 500 for status in statuses)


def test_what_takes_no_question_is_answered_as_the_document_says(url):
    for label in PLAIN:
        assert set(ask(url, label, GenerationMode.POSITIVE, 1)) == {200}


def test_no_endpoint_is_left_out(url):
    api = schemathesis.openapi.from_url(f"{url}/openapi.json")
    assert {each.ok().label for each in api.get_all_operations()} == PLAIN | set(SHARES)
