"""What a server might say of its cell: made up, the same each time."""

from serve_app.engine.core import EngineStats
from serve_app.ingress.client import EngineStatus
from serve_app.runtime.snapshot import CellView, StageView, WorkerView

MIB = 1 << 20


def make_view(tp, pp, dp, *, empty=(), idle=False, num_nodes=1):
    """Four layers a stage, two experts a layer and worker. The seats in `empty` are (stage, rank)."""
    size = tp * dp
    stages = []
    for stage in range(pp):
        workers = [
            _worker(stage, rank, tp, size, seated=(stage, rank) not in empty, idle=idle, num_nodes=num_nodes)
            for rank in range(size)
        ]
        tokens = [worker.tokens for worker in workers]
        imbalance = max(tokens) * size / sum(tokens) if any(tokens) else 1.0
        stages.append(StageView(stage, 4 * stage, 4 * stage + 4, imbalance, 1.02, workers))
    return CellView(7, tp, pp, dp, 2 * size, 8, 2, 14.3, stages)


def _worker(stage, rank, tp, size, *, seated, idle, num_nodes):
    layers = range(4 * stage, 4 * stage + 4)
    return WorkerView(
        name=f"w{stage}.{rank // tp}.{rank % tp}#{stage * size + rank + 1}" if seated else "",
        replica=rank // tp,
        shard=rank % tp,
        node=f"{rank * num_nodes // size:x}" * 56,
        resident_bytes=(180 + 10 * rank) * MIB if seated else 0,
        tokens=1000 * (1 + rank) if seated and not idle else 0,
        primary=[(layer, expert) for layer in layers for expert in (rank, rank + size)],
        standby=[(layers[0], (rank + 1) % size), (layers[1], (rank + 2) % size)],
    )


def make_health(*, ready=True, reason="", live=True):
    stats = EngineStats(
        running=12,
        waiting=3,
        kv_usage=0.41,
        num_pages=8192,
        prompt_tokens_total=0,
        generation_tokens_total=0,
        preemptions_total=0,
        prefix_queries_total=0,
        prefix_hits_total=0,
        finished_total={},
        steps_total=0,
        num_stale=0,
    )
    return EngineStatus(live=live, ready=ready, reason=reason, page_tokens=16, stats=stats if live else None)
