"""Requests, their ends, and epochs."""

import math

import msgspec
import pytest

from serve_app.engine.core import MAX_FRUITLESS
from serve_app.engine.plan import Emit, Plan, Run, Sample, StepDone, Submit
from tests.engine.toy import EOS, Cluster, choose, make_config, make_request, undisturbed


def start(num_pages=64, num_replicas=1, **config):
    cluster = Cluster(make_config(**config), num_pages)
    cluster.begin(num_replicas)
    return cluster


def test_the_end_token_is_emitted_with_stop():
    cluster = start()
    request = make_request("a", [3, 1, 4], max_new_tokens=60)
    cluster.submit(request)
    cluster.drain(100)
    assert cluster.finishes == {"a": "stop"}
    assert cluster.streams["a"][-1] == EOS
    assert EOS not in cluster.streams["a"][:-1]
    cluster.check_streams()


def test_a_requests_own_stop_token_ends_it_too():
    tokens, _ = undisturbed(make_request("a", [3, 1, 4], 60, ignore_eos=True), make_config(), 64)
    cluster = start()
    cluster.submit(make_request("a", [3, 1, 4], 60, ignore_eos=True, stop_token_ids=(tokens[5],)))
    cluster.drain(100)
    assert cluster.finishes == {"a": "stop"}
    assert cluster.streams["a"] == tokens[: tokens.index(tokens[5]) + 1]


def test_end_tokens_are_banned_until_min_new_tokens_are_out():
    cluster = start()
    cluster.submit(make_request("a", [3, 1], 20, min_new_tokens=6, stop_token_ids=(5, 2)))
    cluster.drain(100)
    banned = [part.sample.banned for plan in cluster.plans for part in plan.slices]
    assert banned[:6] == [(EOS, 2, 5)] * 6
    assert set(banned[6:]) <= {()}
    assert len(cluster.streams["a"]) > 6
    cluster.check_streams()


def test_max_new_tokens_and_the_context_bound_the_length():
    cluster = start(max_context_tokens=10)
    cluster.submit(make_request("short", [1, 2], 3, ignore_eos=True))
    cluster.submit(make_request("long", [1, 2], 30, ignore_eos=True))
    cluster.submit(make_request("full", [1] * 10, 30))
    cluster.drain(100)
    assert {rid: len(tokens) for rid, tokens in cluster.streams.items()} == {"short": 3, "long": 8, "full": 0}
    assert set(cluster.finishes.values()) == {"length"}


def test_a_request_that_asks_for_no_token_ends_at_once():
    cluster = start()
    cluster.submit(make_request("a", [1, 2], 0))
    assert cluster.finishes == {"a": "length"}
    assert cluster.plans == []


def test_a_request_without_any_token_is_answered_with_error():
    cluster = start()
    cluster.submit(make_request("a", []))
    assert cluster.finishes == {"a": "error"}


def test_sampling_parameters_reach_the_plan():
    cluster = start()
    cluster.submit(make_request("a", [1, 2, 3], temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=7, logprobs=True))
    sample = cluster.plans[0].slices[0].sample
    assert sample == Sample(0.5, 3, 0.9, 0.1, seed=7, position=3, logprob=True)


def test_logprobs_come_with_the_tokens_where_asked_for():
    cluster = start()
    cluster.submit(make_request("a", [1, 2, 3], 3, logprobs=True))
    (emission,) = [command.emission for command in cluster.step() if hasattr(command, "emission")]
    assert emission.logprobs == [-0.5]


# -- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_before", [1, 5, 9])
def test_a_resumed_stream_goes_on_with_the_same_tokens(num_before):
    whole = make_request("a", [3, 1, 4, 1, 5], 10, ignore_eos=True)
    tokens, _ = undisturbed(whole, make_config(), 64)
    cluster = start()
    cluster.submit(make_request("a", whole.prompt, 10, emitted=tokens[:num_before], ignore_eos=True))
    cluster.drain(20)
    assert cluster.streams["a"] == tokens
    assert cluster.core.stats().generation_tokens_total == 10 - num_before


@pytest.mark.parametrize(("emitted", "finish"), [([5, 6, 7, 8], "length"), ([5, EOS], "stop")])
def test_a_stream_that_had_ended_ends_at_once_when_resumed(emitted, finish):
    cluster = start()
    (command,) = cluster.submit(make_request("a", [3, 1], 4, emitted=emitted))
    assert (command.emission.first, command.emission.tokens) == (len(emitted), [])
    assert command.emission.finish == finish


def test_the_same_request_twice_is_one_request():
    cluster = start()
    request = make_request("a", [3, 1])
    cluster.submit(request)
    assert cluster.submit(request) == []
    cluster.drain(20)
    cluster.check_streams()
    cluster.check_idle()


def test_a_request_that_its_workers_die_of_again_and_again_ends_with_an_error_and_the_others_go_on():
    cluster = start(num_replicas=1)
    cluster.submit(make_request("poison", [3, 1, 4], max_new_tokens=9))
    for _ in range(MAX_FRUITLESS):
        cluster.begin(1)
        assert "poison" not in cluster.finishes
    cluster.submit(make_request("other", [2, 7], max_new_tokens=9))
    cluster.begin(1)
    assert cluster.finishes == {"poison": "error"}
    cluster.drain(20)
    assert cluster.finishes["other"] in {"stop", "length"}
    cluster.check_idle()


# -- cancelling --------------------------------------------------------------------------------------------------


def test_a_cancelled_requests_pages_are_free_once_no_step_can_write_to_them():
    cluster = start()
    cluster.submit(make_request("a", [1] * 9))
    (command,) = cluster.cancel("a")
    assert command.emission.finish == "abort"
    assert cluster.core.stats().running == 0
    assert cluster.core.stats().kv_usage > 0
    cluster.step()
    assert cluster.core.stats().kv_usage == 0
    assert cluster.streams["a"] == []


def test_a_cancelled_prompt_with_chunks_in_flight_is_not_fed_further():
    cluster = start(num_stages=2, max_step_tokens=4)
    cluster.submit(make_request("a", [1] * 20))
    cluster.cancel("a")
    cluster.step()
    assert cluster.core.stats().kv_usage > 0
    cluster.step()
    assert len(cluster.plans) == 2
    cluster.check_idle()


def test_a_waiting_request_can_be_cancelled():
    cluster = start(max_running=1)
    cluster.submit(make_request("a", [1, 2]))
    cluster.submit(make_request("b", [1, 2]))
    cluster.cancel("b")
    assert cluster.core.stats().waiting == 0
    cluster.drain(20)
    cluster.check_streams()


def test_cancelling_what_is_unknown_or_over_does_nothing():
    cluster = start()
    assert cluster.cancel("nobody") == []
    cluster.submit(make_request("a", [1, 2], 1))
    cluster.step()
    assert cluster.cancel("a") == []


def test_a_rid_can_be_used_again_while_its_cancelled_namesake_is_still_in_flight():
    cluster = start(num_stages=2)
    request = make_request("a", [1] * 9)
    cluster.submit(request)
    cluster.cancel("a")
    del cluster.requests["a"], cluster.finishes["a"]
    cluster.submit(request)
    cluster.drain(30)
    cluster.check_streams()


# -- epochs ------------------------------------------------------------------------------------------------------


def test_before_the_first_membership_requests_wait():
    cluster = Cluster(make_config(), 16)
    assert cluster.submit(make_request("a", [1, 2])) == []
    assert cluster.submit(make_request("b", [1, 3])) == []
    cluster.cancel("b")
    assert cluster.core.stats().waiting == 1
    cluster.begin(1)
    cluster.drain(20)
    cluster.check_streams()


def test_a_new_epoch_continues_every_stream_and_drops_the_old_epochs_results():
    cluster = start(num_replicas=2)
    for i in range(4):
        cluster.submit(make_request(f"r{i}", [i + 1] * 5, 12))
    cluster.step(0)
    cluster.step(1)
    late = cluster.replicas[0].plans[0]
    cluster.begin(1)
    done = msgspec.structs.replace(cluster.past[0], epoch=late.epoch, step=late.step)
    assert cluster.on(done) == []
    assert cluster.core.stats().num_stale == 1
    cluster.drain(60)
    cluster.check_streams()


def test_an_older_or_equal_epoch_changes_nothing():
    cluster = start()
    cluster.submit(make_request("a", [1, 2]))
    assert cluster.begin(3, epoch=0) == []
    assert cluster.begin(3, epoch=-5) == []
    cluster.drain(20)
    cluster.check_streams()


def test_with_no_replica_left_requests_wait_for_the_next_membership():
    cluster = start()
    cluster.submit(make_request("a", [1, 2]))
    cluster.step()
    cluster.begin(0)
    assert (cluster.core.stats().waiting, cluster.core.stats().num_pages) == (1, 0)
    cluster.begin(2)
    cluster.drain(20)
    cluster.check_streams()


def test_a_repeated_or_unknown_step_is_ignored():
    cluster = start()
    cluster.submit(make_request("a", [1, 2], 4))
    cluster.step()
    done = cluster.past[0]
    for strange in (done, msgspec.structs.replace(done, step=99), msgspec.structs.replace(done, replica=7)):
        assert cluster.on(strange) == []
    cluster.drain(20)
    cluster.check_streams()


def test_a_new_epoch_with_fewer_pages_ends_what_no_longer_fits():
    cluster = start(num_pages=16)
    cluster.submit(make_request("a", list(range(1, 13)), 40, ignore_eos=True))
    cluster.step()
    cluster.num_pages = 3
    cluster.begin(1)
    assert cluster.finishes == {"a": "length"}
    assert cluster.streams["a"] == [choose(list(range(1, 13)), 0)]


# -- what an epoch keeps -------------------------------------------------------------------------------------------


def busy(num_replicas, num_requests=4, num_steps=3, **config):
    """Replicas in the middle of some requests, each with as many steps in flight as there are stages."""
    cluster = start(num_replicas=num_replicas, num_stages=2, **config)
    for i in range(num_requests):
        cluster.submit(make_request(f"r{i}", [i + 1] * 9, 12, ignore_eos=True))
    for _ in range(num_steps):
        for replica in range(num_replicas):
            cluster.step(replica)
    assert all(len(replica.plans) == 2 for replica in cluster.replicas)
    return cluster


def plans_of(commands):
    return [command.plan for command in commands if isinstance(command, Run)]


def emissions_of(commands):
    return [command.emission for command in commands if isinstance(command, Emit)]


def done(plan, tokens):
    return StepDone(plan.epoch, plan.replica, plan.step, tokens, [-0.5] * len(tokens))


def test_a_kept_replica_runs_exactly_the_steps_in_flight_again():
    cluster = busy(num_replicas=1)
    flying = list(cluster.replicas[0].plans)
    again = plans_of(cluster.begin(1, kept=(0,)))
    assert [(plan.step, plan.slices) for plan in again] == [(plan.step, plan.slices) for plan in flying]
    assert [(plan.epoch, plan.after) for plan in again] == [(1, -1), (1, again[0].step)]


def test_a_kept_replica_goes_on_as_if_nothing_had_happened():
    undisturbed_cluster, cluster = busy(num_replicas=1), busy(num_replicas=1)
    undisturbed_cluster.drain(100)
    again = plans_of(cluster.begin(1, kept=(0,)))
    cluster.drain(100)
    slices = [plan.slices for plan in cluster.plans if plan not in again]
    assert slices == [plan.slices for plan in undisturbed_cluster.plans], "something was computed twice, or never"
    assert cluster.core.stats().replayed_total == 0
    assert cluster.streams == undisturbed_cluster.streams
    cluster.check_streams()
    cluster.check_idle()


def test_results_of_the_steps_that_are_run_again_count_once():
    cluster = busy(num_replicas=1)
    old = cluster.replicas[0].plans[0]
    cluster.begin(1, kept=(0,))
    assert cluster.on(done(old, [5] * len(old.slices))) == [], "it belongs to the epoch before"
    assert cluster.core.stats().num_stale == 1
    cluster.drain(100)
    cluster.check_streams()


def test_the_requests_of_a_replica_at_rest_go_on_at_its_siblings():
    cluster = busy(num_replicas=2)
    spared = {rid for rid, seq in cluster.core._live.items() if seq.replica == 0}
    assert 0 < len(spared) < 4
    again = plans_of(cluster.begin(2, resting=(1,), kept=(0,)))
    assert {plan.replica for plan in again} == {0}
    assert cluster.core.stats().replayed_total == 4 - len(spared)
    cluster.drain(200)
    assert {plan.replica for plan in cluster.plans if plan.epoch == 1} == {0}
    cluster.check_streams()
    cluster.check_idle()


def test_while_all_replicas_rest_requests_wait():
    cluster = busy(num_replicas=2)
    assert plans_of(cluster.begin(2, resting=(0, 1))) == []
    assert plans_of(cluster.submit(make_request("late", [1, 2]))) == []
    stats = cluster.core.stats()
    assert (stats.running, stats.waiting, stats.num_pages, stats.replayed_total) == (0, 5, 0, 4)
    cluster.begin(2, resting=(0,))
    cluster.drain(200)
    assert cluster.core.stats().replayed_total == 4, "they were added once"
    cluster.check_streams()


def test_who_only_waits_moves_to_a_replica_that_has_returned():
    cluster = start(num_replicas=2, max_running=1)
    cluster.begin(2, resting=(1,))
    for i in range(4):
        cluster.submit(make_request(f"r{i}", [i + 1] * 9, 12, ignore_eos=True))
    assert cluster.core.stats().waiting == 3
    again = plans_of(cluster.begin(2, kept=(0,)))
    assert [plan.replica for plan in again] == [0, 1]
    assert (cluster.core.stats().waiting, cluster.core.stats().replayed_total) == (2, 0)
    cluster.drain(100)
    cluster.check_streams()


def test_a_step_that_is_told_of_too_early_is_booked_in_its_turn():
    cluster = busy(num_replicas=1)
    first, second = (done(plan, cluster.replicas[0].compute(plan)) for plan in cluster.replicas[0].plans)
    cluster.replicas[0].plans.clear()
    assert cluster.on(second) == []
    assert cluster.on(second) == []
    tokens = [emission.tokens[0] for emission in emissions_of(cluster.on(first))]
    assert tokens == first.tokens + second.tokens
    cluster.drain(100)
    cluster.check_streams()


def test_a_step_that_was_told_of_too_early_is_not_run_again():
    cluster = busy(num_replicas=1)
    home = cluster.replicas[0]
    first, second = home.plans
    tokens = [home.compute(plan) for plan in (first, second)]
    assert cluster.on(done(second, tokens[1])) == []
    home.plans.remove(second)
    (again,) = plans_of(cluster.begin(1, kept=(0,)))
    assert (again.step, again.slices) == (first.step, first.slices)
    assert [emission.tokens[0] for emission in emissions_of(cluster.step(0))] == tokens[0] + tokens[1]
    cluster.drain(100)
    cluster.check_streams()


# -- asking again ------------------------------------------------------------------------------------------------------

KEEP_S = 10.0


def ask_again(cluster, request, emitted, now=0.0):
    """Submit a known rid with what its ingress has."""
    return cluster.core.on(Submit(msgspec.structs.replace(request, emitted=list(emitted))), now)


def test_a_running_request_that_is_submitted_again_emits_what_is_missing():
    cluster = start()
    request = make_request("a", [3, 1, 4], 12, ignore_eos=True, logprobs=True)
    cluster.submit(request)
    for _ in range(5):
        cluster.step()
    tokens = cluster.streams["a"]
    (emission,) = emissions_of(ask_again(cluster, request, tokens[:2]))
    assert (emission.first, emission.tokens, emission.finish) == (2, tokens[2:], None)
    assert emission.logprobs == [-0.5] * 3
    assert ask_again(cluster, request, tokens) == [], "nothing is missing"
    cluster.drain(20)
    cluster.check_streams()
    cluster.check_idle()


def test_an_ended_request_is_known_for_a_while():
    cluster = start(keep_s=KEEP_S)
    request = make_request("a", [3, 1, 4], 6, ignore_eos=True, logprobs=True)
    cluster.submit(request)
    cluster.drain(20)
    tokens = cluster.streams["a"]
    for num in (0, 4, 6):
        (emission,) = emissions_of(ask_again(cluster, request, tokens[:num], now=KEEP_S - 0.5))
        assert (emission.first, emission.tokens, emission.finish) == (num, tokens[num:], "length")
        assert len(emission.logprobs) == 6 - num
    assert cluster.core.stats().finished_total == {"length": 1}
    assert plans_of(ask_again(cluster, request, tokens[:4], now=KEEP_S)), "it is forgotten: run from there on"
    cluster.core.check_integrity()


@pytest.mark.parametrize("keep_s", [0.0, KEEP_S])
def test_what_was_cancelled_is_not_kept(keep_s):
    cluster = start(keep_s=keep_s)
    request = make_request("a", [3, 1, 4])
    cluster.submit(request)
    cluster.cancel("a")
    ask_again(cluster, request, [])
    stats = cluster.core.stats()
    assert stats.running + stats.waiting == 1, "it is a new request"


def test_of_what_another_engine_emitted_the_tokens_are_known_and_not_their_logprobs():
    cluster = start()
    tokens, _ = undisturbed(make_request("a", [3, 1, 4], 12, ignore_eos=True), make_config(), 64)
    request = make_request("a", [3, 1, 4], 12, emitted=tokens[:2], ignore_eos=True, logprobs=True)
    cluster.submit(request)
    assert cluster.core.stats().replayed_total == 1
    cluster.step()
    (emission,) = emissions_of(ask_again(cluster, request, tokens[:1]))
    assert emission.tokens == tokens[1:3]
    assert math.isnan(emission.logprobs[0])
    assert emission.logprobs[1:] == [-0.5]


# -- the rest ----------------------------------------------------------------------------------------------------


def test_stats_count_what_happened():
    cluster = start()
    cluster.submit(make_request("a", [1, 2, 3], 2, ignore_eos=True))
    cluster.submit(make_request("b", [4, 5], 2))
    cluster.cancel("b")
    cluster.drain(10)
    stats = cluster.core.stats()
    assert stats.finished_total == {"length": 1, "abort": 1}
    assert (stats.prompt_tokens_total, stats.generation_tokens_total, stats.steps_total) == (3, 2, 2)
    assert msgspec.json.decode(msgspec.json.encode(stats), type=type(stats)) == stats


def test_plans_are_data_that_later_events_do_not_change():
    cluster = start(num_stages=2)
    cluster.submit(make_request("a", [1, 2, 3], 20, ignore_eos=True))
    frozen = []
    while cluster.unfinished():
        frozen += [msgspec.msgpack.encode(plan) for plan in cluster.plans[len(frozen) :]]
        cluster.step()
    assert [msgspec.msgpack.encode(plan) for plan in cluster.plans] == frozen
    assert [msgspec.msgpack.decode(data, type=Plan) for data in frozen] == cluster.plans


def test_the_same_events_give_the_same_commands():
    def commands():
        cluster = start(num_stages=2, num_replicas=2, num_pages=8)
        out = []
        for i in range(8):
            out += cluster.submit(make_request(f"r{i}", [i + 1] * (i + 3), 6))
        for i in range(12):
            out += cluster.step(i % 2) if cluster.replicas[i % 2].plans else []
        return out

    assert commands() == commands()


@pytest.mark.parametrize("name", ["num_stages", "page_tokens", "max_running", "max_step_tokens", "max_context_tokens"])
def test_a_bound_below_one_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        make_config(**{name: 0})


def test_a_request_is_not_changed_by_being_served():
    request = make_request("a", [1, 2, 3])
    before = msgspec.json.encode(request)
    cluster = start()
    cluster.submit(request)
    cluster.drain(20)
    assert msgspec.json.encode(request) == before
