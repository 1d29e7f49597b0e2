"""The training view: the document's optimizer, gradient and checkpoint rows, and what its figures would have to be."""

from dataclasses import replace

import pytest

from serve_app.errors import PlanError
from serve_app.model.spec import ModelSpec
from serve_app.plan.counts import count_params
from serve_app.plan.deployment import Deployment
from serve_app.plan.training import Training, training
from tests.plan.cases import BETTER, FP16, R10B, R_SMALL, REFERENCE, SEED

GIB = 2**30


def trained(spec: ModelSpec = R10B, deployment: Deployment = SEED, **changes: int) -> Training:
    """The document's batch of 128 x 10,240 tokens."""
    sizes = {"batch": 128, "sequence": 10_240} | changes
    return training(spec, FP16, REFERENCE, deployment, **sizes)


def test_the_documents_activations_are_the_residuals_of_a_whole_batch_on_one_replica() -> None:
    assert trained(R_SMALL, replace(SEED, dp=1)).saved_bytes / GIB == pytest.approx(5.0)
    assert trained(R_SMALL).saved_bytes / GIB == pytest.approx(2.5)


def test_saved_at_every_fourth_layer_a_stage_keeps_what_comes_into_it() -> None:
    saved = trained(R_SMALL, replace(SEED, dp=1), save_every_layers=4)
    assert saved.saved_bytes / GIB == pytest.approx(5.0 / 4)
    assert saved.again_bytes == pytest.approx(4 * trained(R_SMALL).again_bytes)
    assert trained(R_SMALL, save_every_layers=16).saved_bytes == trained(R_SMALL, save_every_layers=4).saved_bytes


def test_adam_takes_twelve_bytes_of_a_parameter_which_is_not_what_the_document_has() -> None:
    found = trained()
    assert found.optimizer_bytes == pytest.approx(12 * found.params)
    assert found.optimizer_bytes * 10e9 / 32 / found.params == pytest.approx(3.75e9)
    assert found.optimizer_bytes / 1e9 == pytest.approx(4.33, rel=0.01)  # 10.57 B, norms, gates and vocabulary by shard
    assert found.optimizer_bytes < 13.45e9 / 2


def test_a_gpu_has_its_share_of_the_parameters() -> None:
    """Experts once in the cell, attention twice, the vocabulary in each stage."""
    params = count_params(R10B)
    shares = params.experts / 32 + params.attention / 16 + params.embedding / 4
    assert trained().params == pytest.approx(shares, rel=0.001)


def test_standby_slots_and_spares_are_not_trained() -> None:
    assert trained(R10B, replace(SEED, standby=0, spares=0)).params == trained(R10B, replace(SEED, spares=2)).params


def test_the_peak_is_beyond_the_steady_state_by_what_the_backward_pass_needs() -> None:
    found = trained()
    assert found.steady_bytes == found.weights_bytes + found.gradients_bytes + found.optimizer_bytes
    assert found.peak_bytes == found.steady_bytes + found.saved_bytes + found.again_bytes
    assert found.saved_bytes / GIB == pytest.approx(12.5)
    assert found.fits(REFERENCE)
    assert not trained(batch=1024).fits(REFERENCE)


def test_replicas_sum_the_gradients_of_all_but_experts() -> None:
    """Two replicas of one cell have one copy of each expert: each GPU sends as much as its attention's gradients."""
    found = trained()
    dense = found.params - 8 * 3 * 2560 * 5120
    assert found.sync_bytes == pytest.approx(2 * dense)
    assert found.sync_s == pytest.approx(2 * dense / 450e9 + 20e-6)
    assert trained(R10B, replace(SEED, dp=1)).sync_s == 0


def test_cells_sum_the_gradients_of_experts_too_and_over_slower_links() -> None:
    found = trained(R10B, BETTER)
    experts = 32 * 3 * 2560 * 5120
    assert found.sync_bytes == pytest.approx(2 * (2 * 3 / 4 * experts + 2 * 7 / 8 * (found.params - experts)))
    assert found.sync_s == pytest.approx(found.sync_bytes / 50e9 + 20e-6)


def test_synchronized_every_fourth_step_a_step_pays_for_a_quarter() -> None:
    each, fourth = trained(), trained(sync_every_steps=4)
    assert each.compute_s == fourth.compute_s
    assert fourth.step_s - fourth.compute_s == pytest.approx((each.step_s - each.compute_s) / 4)


def test_a_step_computes_four_times_what_prefill_does() -> None:
    """Forward, forward again, and twice that backward: 4 x 0.525 s."""
    assert trained().compute_s == pytest.approx(4 * 0.525, rel=0.01)


def test_a_checkpoint_is_every_parameter_once_and_a_rollback_loses_half_of_what_is_between_two() -> None:
    found = trained()
    assert found.checkpoint_bytes == 12 * count_params(R10B).total
    assert trained(R10B, BETTER).checkpoint_bytes == found.checkpoint_bytes
    assert found.checkpoint_s == pytest.approx(found.checkpoint_bytes / 4 / 1e9)  # four nodes, 1 GB/s each
    assert found.rollback_s(600) == pytest.approx(300 + found.checkpoint_s)


def test_narrower_experts_are_smaller_weights_and_the_same_optimizer() -> None:
    narrow = training(R10B, replace(FP16, experts="fp8"), REFERENCE, SEED, batch=128, sequence=10_240)
    assert narrow.weights_bytes < trained().weights_bytes
    assert narrow.params == pytest.approx(trained().params)


@pytest.mark.parametrize("name", ["batch", "sequence", "sync_every_steps", "save_every_layers"])
def test_sizes_below_one_are_refused_by_name(name: str) -> None:
    with pytest.raises(PlanError, match=f"{name} must be at least 1, not 0"):
        trained(**{name: 0})


def test_a_batch_that_the_replicas_cannot_share_is_refused() -> None:
    with pytest.raises(PlanError, match="batch = 127 must be a multiple of the 2 replicas"):
        trained(batch=127)
