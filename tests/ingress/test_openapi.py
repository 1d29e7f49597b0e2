"""/openapi.json is complete and true, and `/docs` shows it without a network."""

import asyncio
import re
import shutil
from contextlib import asynccontextmanager

import jsonschema
import pytest

from serve_app.config import SloConfig
from serve_app.ingress.terms import Policy
from tests.ingress.conftest import open_world, read_events, serving
from tests.ingress.echo_engine import END_TOKEN
from tests.ingress.test_schemathesis import PLAIN, SHARES

pytestmark = pytest.mark.anyio

PROBES = {"/livez", "/readyz", "/health", "/metrics"}
GENERATING = {"/generate", "/v1/chat/completions", "/v1/completions"}
HEADERS = {
    "x-request-id",
    "Last-Event-ID",
    "x-slo-ttft-ms",
    "x-octavo-priority",
    "x-octavo-late",
    "x-request-timeout-ms",
}
KINDS = {"js": "text/javascript", "css": "text/css", "png": "image/png"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER_S = 60.0
OWN_SERVICES = re.compile(r"[/ .](?!fonts)[\w-]+\.(google|googleapis|gvt1)\.com")  # the browser's, on any page


async def document_of(world):
    response = await world.client.get("/openapi.json")
    assert response.status_code == 200
    return response.json()


def operations(document):
    return [(path, method, how) for path, each in document["paths"].items() for method, how in each.items()]


def validator(document, schema):
    """Of a schema that refers to the document's components."""
    return jsonschema.Draft202012Validator({**schema, "components": document["components"]})


async def test_every_endpoint_is_described_in_full(world):
    document = await document_of(world)
    assert {f"{method.upper()} {path}" for path, method, _ in operations(document)} == PLAIN | set(SHARES)
    for path, method, how in operations(document):
        assert how["description"], path
        assert ("requestBody" in how) == (method == "post"), path
        for status, answer in how["responses"].items():
            assert answer["description"], (path, status)
            for kind, content in answer.get("content", {}).items():
                assert content["schema"], (path, status, kind)
                assert "examples" in content or "example" in content, (path, status, kind)


async def test_every_endpoint_says_what_may_go_wrong(world):
    for path, method, how in operations(await document_of(world)):
        responses = set(how["responses"])
        assert {"431", "500"} <= responses, path
        assert ("401" in responses) == (path not in PROBES), path
        assert "403" in responses or not path.startswith("/admin/"), path
        assert method == "get" or {"400", "408", "413", "503"} <= responses, path
        if path in GENERATING:
            assert {"409", "429"} <= responses, path
            assert set(how["responses"]["429"]["headers"]) >= {"Retry-After", "x-llm-d-request-dropped-reason"}
            assert {each["name"] for each in how["parameters"]} == HEADERS, path
            assert "text/event-stream" in how["responses"]["200"]["content"], path


async def test_every_example_of_a_question_is_answered(world):
    document = await document_of(world)
    world.engine._babble = [*world.tokenizer.encode(" and the leaf"), END_TOKEN]
    for path, method, how in operations(document):
        if method != "post":
            continue
        content = how["requestBody"]["content"]["application/json"]
        for name, example in content["examples"].items():
            validator(document, content["schema"]).validate(example["value"])
            response = await world.client.post(path, json=example["value"])
            # one order stands in the way of the next
            assert response.status_code in {200, 202, 409 if path == "/admin/operations" else 200}, (path, name)


async def test_every_example_of_an_answer_fits_its_schema(world):
    document = await document_of(world)
    for path, _, how in operations(document):
        for status, answer in how["responses"].items():
            content = answer.get("content", {}).get("application/json", {"schema": {}})
            for example in content.get("examples", {}).values():
                validator(document, content["schema"]).validate(example["value"])
                error = example["value"].get("error") if isinstance(example["value"], dict) else None
                if isinstance(error, dict) and "type" in error and isinstance(error.get("code"), int):
                    assert error["code"] == int(status), path


async def test_every_example_of_a_stream_fits_the_schema_of_its_events(world):
    document = await document_of(world)
    for path in GENERATING:
        content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
        (schema,) = [each for each in content["schema"]["properties"]["data"]["anyOf"] if "contentSchema" in each]
        for example in content["examples"].values():
            for data in read_events(example["value"]):
                if data != "[DONE]":
                    validator(document, schema["contentSchema"]).validate(data)


async def test_the_document_tells_what_this_server_serves(tokenizer):
    slo = SloConfig(priorities={"batch": 0.5, "chat": 1.0}, default_priority="chat", refusal_status=529)
    async with open_world(tokenizer, policy=Policy(slo)) as world:
        document = await document_of(world)
    schemas = document["components"]["schemas"]
    assert schemas["ChatFields"]["properties"]["model"]["anyOf"][0]["const"] == "tiny"
    assert schemas["DetokenizeFields"]["properties"]["tokens"]["items"]["maximum"] == 409
    how = document["paths"]["/generate"]["post"]
    (priority,) = [each["schema"] for each in how["parameters"] if each["name"] == "x-octavo-priority"]
    assert priority == {"type": "string", "enum": ["batch", "chat"], "default": "chat"}
    assert "529" in how["responses"]
    assert "429" not in how["responses"]


async def test_a_fault_has_the_shape_of_its_path(world):
    lost = await world.client.get("/v1/nowhere")
    assert set(lost.json()["error"]) == {"message", "type", "param", "code"}
    assert lost.status_code == 404
    wrong = await world.client.get("/admin/events?after=yesterday")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, 422)
    assert wrong.json()["error"]["message"].startswith("query.after: input should be a valid number")


# -- the page ---------------------------------------------------------------------------------------------------------


async def test_the_page_and_its_files_come_from_this_server(world):
    page = await world.client.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(addresses) == 4
    for address in addresses:
        assert not re.match(r"[a-z]*:|/", address), "it would be sought elsewhere, or above a prefix"
        file = await world.client.get(f"/{address}")
        assert file.status_code == 200
        assert file.headers["content-type"].split(";")[0] == KINDS[address.rpartition(".")[2]]
        assert file.content
    for path in ("/docs/nothing.js", "/docs/..%2fcore.py", "/docs/%2e%2e/core.py", "/redoc"):
        assert (await world.client.get(path)).status_code == 404


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
async def test_a_browser_shows_every_endpoint_and_asks_nobody_else(world, tmp_path):
    seen = []
    document = await document_of(world)
    async with serving(world) as (host, port), a_proxy(seen) as proxy:
        dom = await shown_by_browser(f"http://{host}:{port}/docs", proxy, tmp_path)
    missing = [path for path, _, _ in operations(document) if f'data-path="{path}"' not in dom]
    assert not missing
    assert [line for line in seen if not OWN_SERVICES.search(line)] == [], "the page asked for what is not here"


@asynccontextmanager
async def a_proxy(seen):
    """A proxy for all that is not on loopback: it gives nothing, and notes who asks."""

    async def note(reader, writer):
        seen.append((await reader.readline()).decode(errors="replace"))
        writer.close()

    server = await asyncio.start_server(note, "127.0.0.1", 0)
    async with server:
        yield "{}:{}".format(*server.sockets[0].getsockname())


async def shown_by_browser(url, proxy, folder):
    """The page's elements as they are once its scripts have run."""
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--disable-features=NetworkTimeServiceQuerying,OptimizationHints,MediaRouter,AutofillServerCommunication",
        "--disable-default-apps",
        "--disable-domain-reliability",
        "--no-pings",
        f"--proxy-server={proxy}",
        f"--user-data-dir={folder}",
        "--virtual-time-budget=10000",
        "--dump-dom",
        url,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        printed, _ = await asyncio.wait_for(process.communicate(), BROWSER_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return printed.decode()
