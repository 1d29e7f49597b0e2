"""What training the model on a deployment would take: bytes of one GPU, seconds of one step. Serving has none of it.

`octavo plan --view training`. Each stage runs forward and backward over a batch that its replicas share. Residuals are
saved at every `save_every_layers` layers, for all sequences of a replica at once (GPipe, arXiv 1811.06965), and what is
between them is computed again (arXiv 1604.06174). Experts of a cell are there once, spread over all GPUs of their
stage, so that their gradients are summed over cells only; those of all else over all replicas.
"""

from dataclasses import dataclass, replace

from serve_app.errors import PlanError
from serve_app.experts.layout import stage_layers
from serve_app.model.spec import ModelSpec
from serve_app.plan.bounds import Bounds
from serve_app.plan.counts import Precision, count_params
from serve_app.plan.deployment import Deployment
from serve_app.plan.footprint import footprint
from serve_app.plan.system import System

ADAM_BYTES = 12  # of a parameter, fp32: master weight and both moments (arXiv 1710.03740, 1412.6980)
_PASSES = 4  # forward, forward again, and a backward of two


@dataclass(frozen=True)
class Training:
    """Bytes are of the fullest GPU where nothing else is said."""

    params: float
    """Parameters: primary experts, its heads of its layers, and its part of the vocabulary."""
    weights_bytes: float
    """Each class of parameters in its precision."""
    gradients_bytes: float
    """One of each parameter, in the precision of weights."""
    optimizer_bytes: float
    """params x 12: fp32 master weight and Adam's two moments."""
    saved_bytes: float
    """Residuals: batch / DP x sequence x hidden x value bytes x layers of a stage / save_every_layers."""
    again_bytes: float
    """What is computed again of one sequence, between two saved residuals: the vectors of attention's heads and of the
    experts' rows, of sequence x save_every_layers layers."""
    compute_s: float
    """A step: batch x prompt FLOPs x 4 / (FLOP/s of all GPUs), over the share in which the pipeline is full."""
    sync_bytes: float
    """Sent by each GPU at a synchronization: 2 (n - 1) / n x gradients, with n replicas for attention, gates, norms and
    vocabulary, and n cells for experts."""
    sync_s: float
    """sync_bytes over the slowest link among them, and a collective's two halves."""
    sync_every_steps: int
    update_s: float
    """Memory traffic of Adam: 24 bytes of state read and written, a gradient read, a weight written."""
    checkpoint_bytes: float
    """12 bytes of each parameter of the model, once, whoever writes them."""
    checkpoint_s: float
    """checkpoint_bytes / nodes / disk bandwidth of a node."""

    @property
    def steady_bytes(self) -> float:
        """Between two steps: weights, gradients and optimizer."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def peak_bytes(self) -> float:
        """At the beginning of the backward pass."""
        return self.steady_bytes + self.saved_bytes + self.again_bytes

    @property
    def step_s(self) -> float:
        """In the mean: one of `sync_every_steps` steps synchronizes and updates."""
        return self.compute_s + (self.sync_s + self.update_s) / self.sync_every_steps

    def fits(self, system: System) -> bool:
        room = system.memory_share * system.memory_gb * 1e9
        return self.peak_bytes + system.runtime_gb * 1e9 <= room

    def rollback_s(self, every_s: float) -> float:
        """That a failure costs with a checkpoint every so many seconds: half of that is lost, and one is loaded."""
        return every_s / 2 + self.checkpoint_s


def training(
    spec: ModelSpec,
    precision: Precision,
    system: System,
    deployment: Deployment,
    *,
    batch: int,
    sequence: int,
    sync_every_steps: int = 1,
    save_every_layers: int = 1,
) -> Training:
    """`batch`: sequences of a step, over all replicas. Raises PlanError naming what is below one or does not divide."""
    sizes = {"batch": batch, "sequence": sequence, "sync_every_steps": sync_every_steps}
    _check(deployment, sizes | {"save_every_layers": save_every_layers})
    seats = replace(deployment, standby=0, spares=0)
    held = footprint(spec, precision, system, seats, kv_tokens=0, chunk_tokens=1)
    dense = (held.dense_bytes + held.vocabulary_bytes) / precision.weight_bytes
    params = dense + held.experts_bytes / precision.expert_bytes
    layers = max(map(len, stage_layers(spec.num_layers, deployment.pp)))
    sequences = batch / deployment.num_replicas
    size = precision.weight_bytes
    experts = params - dense
    sync_bytes = _reduced(dense * size, deployment.num_replicas) + _reduced(experts * size, deployment.cells)
    bounds = Bounds(spec, precision, system, seats)
    checkpoint_bytes = float(ADAM_BYTES * count_params(spec).total)
    return Training(
        params=params,
        weights_bytes=held.weights_bytes,
        gradients_bytes=params * size,
        optimizer_bytes=params * ADAM_BYTES,
        saved_bytes=_saved_bytes(spec, precision, sequences * sequence, max(1.0, layers / save_every_layers)),
        again_bytes=_again_bytes(spec, precision, deployment.tp, sequence, min(layers, save_every_layers)),
        compute_s=_PASSES * bounds.at_once_s(batch, sequence),
        sync_bytes=sync_bytes,
        sync_s=_sync_s(system, deployment, sync_bytes),
        sync_every_steps=sync_every_steps,
        update_s=params * (2 * ADAM_BYTES + 2 * size) / bounds.gpu_bytes,
        checkpoint_bytes=checkpoint_bytes,
        checkpoint_s=checkpoint_bytes / _num_nodes(system, seats) / (system.disk_gb_s * 1e9),
    )


def _check(deployment: Deployment, sizes: dict[str, int]) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise PlanError(f"{name} must be at least 1, not {value}.")
    if sizes["batch"] % deployment.num_replicas:
        raise PlanError(f"batch = {sizes['batch']} must be a multiple of the {deployment.num_replicas} replicas.")


def _saved_bytes(spec: ModelSpec, precision: Precision, num_tokens: float, num_saved: float) -> float:
    """A residual vector of each token, so many times. Shards have all of it each."""
    return num_tokens * spec.hidden_size * precision.activation_bytes * num_saved


def _again_bytes(spec: ModelSpec, precision: Precision, tp: int, num_tokens: int, num_layers: int) -> float:
    """Two normed vectors, q, k, v and their sum, and in and out and three inner vectors of each expert's row."""
    attention = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim / tp
    experts = spec.top_k * (2 * spec.hidden_size + 3 * spec.expert_size) / tp
    return num_tokens * num_layers * (2 * spec.hidden_size + attention + experts) * precision.activation_bytes


def _reduced(num_bytes: float, num_copies: int) -> float:
    """A ring's all-reduce: each sends all but its share, twice (Patarasu and Yuan, doi 10.1016/j.jpdc.2008.09.002)."""
    return 2 * (num_copies - 1) / num_copies * num_bytes


def _sync_s(system: System, deployment: Deployment, sync_bytes: float) -> float:
    """Among replicas of one stage and shard: within a node where a stage is in one, and the cells."""
    if deployment.num_replicas == 1:
        return 0.0
    span = deployment.ep if deployment.cells == 1 else deployment.num_gpus
    is_inside = span <= system.gpus_per_node
    rate = (system.intra_gb_s if is_inside else system.inter_gb_s) * 1e9 * system.efficiency.link
    return sync_bytes / rate + 2 * system.efficiency.collective_us / 1e6


def _num_nodes(system: System, deployment: Deployment) -> int:
    return -(-deployment.num_gpus // system.gpus_per_node)
