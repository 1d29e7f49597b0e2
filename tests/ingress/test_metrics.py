"""The metrics have the names that dashboards read, count what happened, and never count backwards."""

import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.engine.core import EngineStats
from serve_app.engine.members import CellStats
from serve_app.telemetry.metrics import ServingMetrics

pytestmark = pytest.mark.anyio

NAMES = {
    "gauge": {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "octavo:epoch",
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
    },
    "summary": {"octavo:failover_phase_seconds"},
    "histogram": {
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
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


async def scrape(world):
    response = await world.client.get("/metrics")
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
    assert checked.returncode == 0, checked.stdout + checked.stderr


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
    given = [cell(2, load=(2, 8.0)), cell(0), None, cell(1, load=(2, 9.0)), cell(1, load=(1, 0.5), fence=(1, 0.25))]
    seen = [parse(metrics.render(stats(0), 4, cell=each).decode()) for each in given]
    load, fence = (("phase", "load"),), (("phase", "fence"),)
    assert [each["octavo:workers_lost_total", ()] for each in seen] == [2, 2, 2, 3, 3]
    assert [each["octavo:stale_messages_total", ()] for each in seen] == [20, 20, 20, 30, 30]
    assert [each["octavo:failover_phase_seconds_count", load] for each in seen] == [2, 2, 2, 4, 5]
    assert [each["octavo:failover_phase_seconds_sum", load] for each in seen] == [8.0, 8.0, 8.0, 17.0, 17.5]
    assert seen[-1]["octavo:failover_phase_seconds_sum", fence] == 0.25


def test_the_time_of_tokens_that_come_together_is_shared():
    times = iter([0.0, 2.0, 3.0, 4.0, 4.0])  # accepted, three times tokens, finished
    metrics = ServingMetrics("tiny", 512, clock=lambda: next(times))
    with metrics.watch(7) as watch:
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
