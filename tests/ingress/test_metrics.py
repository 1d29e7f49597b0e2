"""The metrics have the names that dashboards read, count what happened, and never count backwards."""

import asyncio
import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.engine.core import EngineStats
from serve_app.engine.members import CellStats
from serve_app.engine.request import Emission, Request, Terms
from serve_app.ingress.faults import AbortedError, RefusedError
from serve_app.runtime.tallies import TELL_S
from serve_app.telemetry.ledger import LocalBook
from serve_app.telemetry.metrics import Objective, ServingMetrics
from tests.telemetry.cell import Cell

pytestmark = pytest.mark.anyio

WAIT_S = 20.0

NAMES = {
    "gauge": {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "octavo:epoch",
        "octavo:admission_budget_tokens",
    },
    "counter": {
        "vllm:prompt_tokens",
        "vllm:generation_tokens",
        "vllm:request_success",
        "vllm:num_preemptions",
        "vllm:prefix_cache_queries",
        "vllm:prefix_cache_hits",
        "octavo:requests_replayed",
        "octavo:workers_lost",
        "octavo:stale_messages",
        "vllm:admission_rejections",
        "octavo:slo_violations",
        "octavo:slo_close_calls",
    },
    "summary": {"octavo:failover_phase_seconds"},
    "histogram": {
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
        "vllm:request_queue_time_seconds",
        "octavo:predicted_ttft_error_seconds",
    },
}


def parse(text):
    """{(sample name, labels besides the model): value}; every sample names the model."""
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "tiny"
            samples[sample.name, tuple(sorted(labels.items()))] = sample.value
    return samples


async def scrape(world, client=None):
    response = await (client or world.client).get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return parse(response.text)


async def test_the_names_are_those_that_dashboards_read(world):
    text = (await world.client.get("/metrics")).text
    families = {family.name: family.type for family in text_string_to_metric_families(text)}
    for kind, names in NAMES.items():
        assert {name for name in names if families.get(name) == kind} == names
    assert all(name.startswith(("vllm:", "octavo:")) for name in families)


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_has_no_objection():
    text = ServingMetrics("tiny", 512).render(stats(1), 4, epoch=3, cell=cell(2, load=(1, 0.5)))
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    said = (checked.stdout + checked.stderr).decode()
    assert checked.returncode in {0, 3}, said  # 3: it has advice
    assert all(line.endswith("should not contain ':'") for line in said.splitlines()), said  # the names are vLLM's


async def test_requests_are_counted_by_how_they_ended(world):
    world.say("Rome", " is the capital of Italy")
    bodies = [
        {"text": "Rome"},
        {"text": "Rome"},
        {"text": "Rome", "sampling_params": {"max_new_tokens": 2}},
        {"text": "Norway", "sampling_params": {"stop": "after it, and so"}},
    ]
    answers = [(await world.post(body)).json() for body in bodies]
    await world.post({"text": ""})
    world.engine.failing_after = 1
    await world.post({"text": "Rome"})
    seen = await scrape(world)
    ends = {labels[0][1]: value for (name, labels), value in seen.items() if name == "vllm:request_success_total"}
    assert ends == {"stop": 3, "length": 1, "error": 1, "abort": 0}
    assert seen["vllm:time_to_first_token_seconds_count", ()] == 5
    assert seen["vllm:e2e_request_latency_seconds_count", ()] == 4
    assert seen["vllm:request_prompt_tokens_count", ()] == 5
    assert seen["vllm:request_generation_tokens_bucket", (("le", "2.0"),)] == 2  # the short one and the failed one
    generated = seen["vllm:request_generation_tokens_sum", ()]
    assert generated == sum(answer["meta_info"]["completion_tokens"] for answer in answers) + 1
    assert seen["vllm:inter_token_latency_seconds_count", ()] == generated - 5


async def test_the_engine_is_described(world):
    body = {"input_ids": list(range(3, 43)), "sampling_params": {"max_new_tokens": 1}}
    for _ in range(2):
        await world.post(body)
    seen = await scrape(world)
    assert seen["vllm:cache_config_info", (("block_size", "4"), ("num_gpu_blocks", "4096"))] == 1
    assert seen["vllm:num_requests_running", ()] == seen["vllm:num_requests_waiting", ()] == 0
    assert seen["vllm:prompt_tokens_total", ()] == 80
    assert seen["vllm:prefix_cache_hits_total", ()] == 36
    assert seen["vllm:generation_tokens_total", ()] == 2


async def test_without_an_engine_counters_stand_still_and_gauges_are_absent(world):
    await world.post({"text": "Rome"})
    before = await scrape(world)
    world.engine.broken = "gone"
    after = await scrape(world)
    assert after == {key: value for key, value in before.items() if key[0] not in NAMES["gauge"]}
    assert after["vllm:prompt_tokens_total", ()] > 0


def stats(num_tokens):
    totals = dict.fromkeys(
        ["prompt_tokens_total", "generation_tokens_total", "preemptions_total", "prefix_queries_total"], num_tokens
    )
    return EngineStats(
        running=0,
        waiting=0,
        kv_usage=0.0,
        num_pages=1,
        prefix_hits_total=num_tokens,
        finished_total={},
        steps_total=num_tokens,
        num_stale=0,
        replayed_total=num_tokens,
        **totals,
    )


def test_counters_go_on_when_an_engine_starts_again_from_zero():
    metrics = ServingMetrics("tiny", 512)
    scrapes = [stats(10), stats(25), None, stats(3), stats(3), stats(8), stats(0)]
    seen = [parse(metrics.render(given, 4).decode())["vllm:generation_tokens_total", ()] for given in scrapes]
    assert seen == [10, 25, 25, 28, 28, 33, 33]


def cell(num_lost, **phases):
    return CellStats(
        phase="degraded",
        reason="",
        workers={"serving": 3, "starting": 1},
        experts_uncovered=5,
        stale_total=10 * num_lost,
        lost_total=num_lost,
        phase_seconds=phases,
    )


def test_the_cell_is_described():
    metrics = ServingMetrics("tiny", 512)
    seen = parse(metrics.render(stats(7), 4, epoch=3, cell=cell(2, fence=(2, 0.5), load=(1, 4.0))).decode())
    assert seen["octavo:epoch", ()] == 3
    assert seen["octavo:experts_uncovered", ()] == 5
    assert seen["octavo:workers_lost_total", ()] == 2
    assert seen["octavo:stale_messages_total", ()] == 20
    assert seen["octavo:requests_replayed_total", ()] == 7
    workers = {labels[0][1]: value for (name, labels), value in seen.items() if name == "octavo:workers"}
    assert workers == {"serving": 3, "starting": 1, "hosting": 0, "loaded": 0, "spare": 0}
    fence = (("phase", "fence"),)
    assert seen["octavo:failover_phase_seconds_count", fence] == 2
    assert seen["octavo:failover_phase_seconds_sum", fence] == 0.5
    seen = parse(metrics.render(stats(7), 4, epoch=3).decode())
    assert not {"octavo:workers", "octavo:experts_uncovered"} & {name for name, _ in seen}
    assert seen["octavo:workers_lost_total", ()] == 2


def test_the_cells_counts_go_on_when_its_engine_starts_again_from_zero():
    metrics = ServingMetrics("tiny", 512)
    given = [cell(2, load=(2, 8.0)), cell(0), None, cell(1, load=(2, 9.0)), cell(0, load=(1, 0.5), fence=(1, 0.25))]
    seen = [parse(metrics.render(stats(0), 4, cell=each).decode()) for each in given]
    load, fence = (("phase", "load"),), (("phase", "fence"),)
    assert [each["octavo:workers_lost_total", ()] for each in seen] == [2, 2, 2, 3, 3]
    assert [each["octavo:stale_messages_total", ()] for each in seen] == [20, 20, 20, 30, 30]
    assert [each["octavo:failover_phase_seconds_count", load] for each in seen] == [2, 2, 2, 4, 5]
    assert [each["octavo:failover_phase_seconds_sum", load] for each in seen] == [8.0, 8.0, 8.0, 17.0, 17.5]
    assert seen[-1]["octavo:failover_phase_seconds_sum", fence] == 0.25


def test_the_time_of_tokens_that_come_together_is_shared():
    times = iter([0.0, 2.0, 3.0, 4.0, 4.0, 4.0])  # accepted, three times tokens, finished, closed
    metrics = ServingMetrics("tiny", 512, clock=lambda: next(times))
    with metrics.watch(Request("r", [5] * 7)) as watch:
        for num_tokens in (1, 4, 0, 1):
            watch.generated(num_tokens)
        watch.finished("stop")
    seen = parse(metrics.render(None, 4).decode())
    assert seen["vllm:time_to_first_token_seconds_sum", ()] == 2.0
    assert seen["vllm:inter_token_latency_seconds_sum", ()] == 2.0
    assert seen["vllm:inter_token_latency_seconds_count", ()] == 5
    assert seen["vllm:inter_token_latency_seconds_bucket", (("le", "0.2"),)] == 0
    assert seen["vllm:inter_token_latency_seconds_bucket", (("le", "0.3"),)] == 4
    assert seen["vllm:e2e_request_latency_seconds_sum", ()] == 4.0


def test_a_name_for_the_model_may_have_any_character():
    metrics = ServingMetrics('a "b"\\\n/c', 512)
    for family in text_string_to_metric_families(metrics.render(stats(1), 4).decode()):
        assert all(sample.labels["model_name"] == 'a "b"\\\n/c' for sample in family.samples)


class Clock:
    """Time goes on when a test says so."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


class Desk:
    """Metrics on a clock that stands, with a server's promise of 10 s, and 9.5 s to be alerted at."""

    def __init__(self):
        self.clock = Clock()
        self.metrics = ServingMetrics("tiny", 512, clock=self.clock, objective=Objective(10.0, 9.5))

    def serve(self, ttft_s, own_ttft_s=0.0, **told):
        """A request whose first token comes after so long; what its emission tells."""
        with self.metrics.watch(Request("r", [5], terms=Terms(ttft_s=own_ttft_s))) as watch:
            self.clock.now_s += ttft_s
            watch.generated(1, Emission("r", 0, [7], [], 0, None, **told))
            watch.finished("length")

    def seen(self):
        return parse(self.metrics.render(None, 4).decode())


def test_a_first_token_after_the_objective_is_a_violation_and_shortly_before_it_a_close_call():
    desk = Desk()
    for ttft_s in (1.0, 9.4, 9.5, 10.0, 10.1, 60.0):
        desk.serve(ttft_s)
    seen = desk.seen()
    assert seen["octavo:slo_violations_total", ()] == 2
    assert seen["octavo:slo_close_calls_total", ()] == 2


def test_a_request_is_judged_by_its_own_objective_where_it_has_one():
    desk = Desk()
    for ttft_s, own_ttft_s in ((0.9, 1.0), (0.96, 1.0), (1.1, 1.0), (30.0, 40.0)):
        desk.serve(ttft_s, own_ttft_s)
    seen = desk.seen()
    assert seen["octavo:slo_violations_total", ()] == 1
    assert seen["octavo:slo_close_calls_total", ()] == 1


def test_a_request_that_never_got_a_token_is_a_violation_only_once_its_objective_has_passed():
    desk = Desk()
    for waited_s in (9.9, 10.1):
        with desk.metrics.watch(Request("r", [5])):
            desk.clock.now_s += waited_s
    seen = desk.seen()
    assert seen["octavo:slo_violations_total", ()] == 1
    assert seen["octavo:slo_close_calls_total", ()] == 0
    assert seen["vllm:request_success_total", (("finished_reason", "abort"),)] == 2


def test_without_a_promise_nothing_is_a_violation():
    clock = Clock()
    metrics = ServingMetrics("tiny", 512, clock=clock)
    with metrics.watch(Request("r", [5])) as watch:
        clock.now_s += 1e6
        watch.generated(1)
    assert parse(metrics.render(None, 4).decode())["octavo:slo_violations_total", ()] == 0


def test_predictions_that_were_too_high_and_too_low_are_told_apart():
    desk = Desk()
    name = "octavo:predicted_ttft_error_seconds"
    for ttft_s, predicted_ttft_s in ((2.0, 1.0), (1.0, 4.0), (1.0, 1.0), (1.0, None)):
        desk.serve(ttft_s, predicted_ttft_s=predicted_ttft_s)
    seen = desk.seen()
    assert seen[f"{name}_count", ()] == 3
    assert [seen[f"{name}_bucket", (("le", le),)] for le in ("-5.0", "-2.5", "0.0", "0.5", "1.0")] == [0, 1, 2, 2, 3]
    assert (f"{name}_sum", ()) not in seen  # it would fall


def test_the_time_in_the_queue_is_what_the_engine_says():
    desk = Desk()
    for queued_s in (0.5, None, 3.0):
        desk.serve(5.0, queued_s=queued_s)
    seen = desk.seen()
    assert seen["vllm:request_queue_time_seconds_count", ()] == 2
    assert seen["vllm:request_queue_time_seconds_sum", ()] == 3.5


async def fail_with(world, error):
    """POST a request that the engine ends so."""

    async def submit(request):
        raise error
        yield

    world.engine.submit = submit
    await world.post({"text": "Rome"})


async def test_a_refusal_is_counted_by_its_reason_and_is_no_request_that_was_served(world):
    await fail_with(world, RefusedError("queue-full", "too many wait", 1.0))
    seen = await scrape(world)
    rejections = {labels[0][1]: n for (name, labels), n in seen.items() if name == "vllm:admission_rejections_total"}
    assert rejections == {"ttft": 0, "queue-full": 1, "fair-share": 0}
    assert sum(n for (name, _), n in seen.items() if name == "vllm:request_success_total") == 0
    assert seen["vllm:request_prompt_tokens_count", ()] == 0


async def test_a_request_that_somebody_ended_is_no_error(world):
    await fail_with(world, AbortedError("aborted"))
    seen = await scrape(world)
    assert seen["vllm:request_success_total", (("finished_reason", "abort"),)] == 1
    assert seen["vllm:request_success_total", (("finished_reason", "error"),)] == 0


async def test_a_connection_that_is_taken_over_is_no_error(world):
    world.engine.hold_after = 2
    body = {"text": "Rome", "rid": "r", "stream": True, "sampling_params": {"max_new_tokens": 4}}
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
        first = tasks.create_task(world.post(body))
        await world.engine.submitted.wait()
        second = tasks.create_task(world.post(body, **{"last-event-id": "0"}))
        await first
        world.engine.hold_after = None
        world.engine.running.set()
        assert "[DONE]" in (await second).text
    seen = await scrape(world)
    ends = {labels[0][1]: n for (name, labels), n in seen.items() if name == "vllm:request_success_total"}
    assert ends == {"stop": 0, "length": 1, "abort": 1, "error": 0}


async def test_every_replica_shows_what_all_have_served(world):
    cell = Cell()
    clients = [world.replica(book=cell.join(name)) for name in ("a", "b")]
    body = {"text": "Rome", "sampling_params": {"max_new_tokens": 2}}
    for client, num_requests in zip(clients, (3, 1), strict=True):
        for _ in range(num_requests):
            assert (await client.post("/generate", json=body)).status_code == 200
    cell.beat(TELL_S)
    seen = [await scrape(world, client) for client in clients]
    assert seen[0] == seen[1]
    assert seen[0]["vllm:request_success_total", (("finished_reason", "length"),)] == 4
    assert seen[0]["vllm:time_to_first_token_seconds_count", ()] == 4
    cell.kill("a")
    after = await scrape(world, world.replica(book=cell.join("c")))
    assert after == seen[1]
    for client in clients:
        await client.aclose()


async def test_a_replica_that_has_not_been_told_yet_shows_no_counts_rather_than_zeros(world):
    cell = Cell()
    cell.stop_engine()
    client = world.replica(book=cell.join("a"))
    await client.post("/generate", json={"text": "Rome", "sampling_params": {"max_new_tokens": 2}})
    names = {name for name, _ in await scrape(world, client)}
    assert names == NAMES["gauge"]
    cell.start_engine()
    seen = await scrape(world, client)
    assert seen["vllm:request_success_total", (("finished_reason", "length"),)] == 1
    await client.aclose()


def test_what_a_token_costs_to_count_does_not_grow_with_those_that_came_with_it():
    book = LocalBook()
    metrics = ServingMetrics("tiny", 512, book=book)
    with metrics.watch(Request("r", [5])) as watch:
        watch.generated(1)
        watch.generated(10**9)
    assert parse(metrics.render(None, 4).decode())["vllm:inter_token_latency_seconds_count", ()] == 10**9
