"""Requests, their ends, and epochs."""

import msgspec
import pytest

from serve_app.engine.plan import Plan, Sample
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
