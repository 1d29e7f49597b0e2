"""The router counts every token that an expert ran, wherever it ran."""

from serve_app.runtime.wire import Report
from tests.runtime.cell import ThreadedCell
from tests.runtime.test_cell import config_of, requests_of, weights  # noqa: F401, the fixture

WAIT_S = 20.0


def test_every_token_is_counted_once_per_layer_and_expert(weights):  # noqa: F811
    requests = requests_of(weights, 6, seed=3, max_new_tokens=10)
    with ThreadedCell(weights, config_of(2, 2, 2, standby_slots=3, prefix_cache=False)) as cell:
        for request in requests:
            cell.submit(request)
        cell.collect(len(requests))
        num_tokens = sum(len(request.prompt) + 10 - 1 for request in requests)  # the last token is never run
        expected = num_tokens * weights.spec.num_layers * weights.spec.top_k
        counted = 0
        while counted < expected:
            received = cell.router_mesh.receive(WAIT_S)
            assert received is not None, f"{counted} of {expected} token runs reported"
            if not isinstance(received.message, Report):  # the engine's signs of life
                continue
            cell.registry.add(received.message, now_s=1.0)
            counted += sum(count for _, _, count in received.message.counts)
        assert counted == expected
        stages = cell.registry.snapshot(now_s=1.0).stages
        assert sum(worker.tokens for stage in stages for worker in stage.workers) == expected
        assert all(1 <= stage.imbalance < 2 for stage in stages)
        assert all(worker.resident_bytes > 0 for stage in stages for worker in stage.workers)
