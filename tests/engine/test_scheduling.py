"""What goes into a step."""

import pytest

from tests.engine.toy import Cluster, make_config, make_request


def start(num_pages=64, num_replicas=1, **config):
    cluster = Cluster(make_config(**config), num_pages)
    cluster.begin(num_replicas)
    return cluster


def prompt(num_tokens, first=1):
    return [(first + i) % 16 + 1 for i in range(num_tokens)]


def endless(rid, tokens, **changes):
    return make_request(rid, tokens, **{"max_new_tokens": 40, "ignore_eos": True, **changes})


def shape(plan):
    return [(part.start, len(part.tokens)) for part in plan.slices]


def in_flight(cluster, replica=0):
    return [shape(plan) for plan in cluster.replicas[replica].plans]


def test_a_long_prompt_is_cut_into_chunks_of_the_step_budget():
    cluster = start(max_step_tokens=16)
    cluster.submit(endless("a", prompt(40)))
    for _ in range(3):
        cluster.step()
    assert [shape(plan) for plan in cluster.plans] == [[(0, 16)], [(16, 16)], [(32, 8)], [(40, 1)]]
    assert [plan.slices[0].sample is not None for plan in cluster.plans] == [False, False, True, True]


def test_chunks_of_one_prompt_follow_each_other_through_the_stages():
    cluster = start(num_stages=3, max_step_tokens=16)
    cluster.submit(endless("a", prompt(40)))
    assert in_flight(cluster) == [[(0, 16)], [(16, 16)], [(32, 8)]]


def test_every_stage_gets_a_chunk_of_a_prompt_that_would_fit_one_step():
    roomy = {"num_pages": 256, "max_step_tokens": 1000, "max_context_tokens": 1000}
    cluster = start(num_stages=4, **roomy)
    cluster.submit(endless("a", prompt(600)))
    assert in_flight(cluster) == [[(0, 150)], [(150, 150)], [(300, 150)], [(450, 150)]]
    alone = start(**roomy)
    alone.submit(endless("a", prompt(600)))
    assert in_flight(alone) == [[(0, 600)]]


def test_what_a_chunk_leaves_of_a_step_is_for_other_prompts():
    cluster = start(num_pages=256, num_stages=2, max_step_tokens=200, max_context_tokens=1000)
    for first, rid in enumerate("abc"):
        cluster.submit(endless(rid, prompt(260, first)))
    cluster.step()
    assert in_flight(cluster)[-1] == [(0, 130), (0, 70)]


def test_a_sequence_is_not_run_again_before_its_token_is_back():
    cluster = start(num_stages=4)
    cluster.submit(endless("a", prompt(4)))
    assert in_flight(cluster) == [[(0, 4)]]
    cluster.step()
    assert in_flight(cluster) == [[(4, 1)]]


def test_decode_comes_before_prefill_in_a_full_step():
    cluster = start(max_step_tokens=8)
    cluster.submit(endless("a", prompt(3)))
    cluster.submit(endless("b", prompt(20)))
    cluster.step()
    assert in_flight(cluster) == [[(3, 1), (0, 7)]]
    cluster.step()
    assert in_flight(cluster) == [[(4, 1), (7, 7)]]


def test_prompts_are_begun_in_the_order_of_their_arrival():
    cluster = start(max_step_tokens=8, prefix_cache=False)
    for rid, num_tokens in [("a", 10), ("b", 5), ("c", 2)]:
        cluster.submit(endless(rid, prompt(num_tokens)))
    cluster.step()
    assert in_flight(cluster) == [[(8, 2), (0, 5), (0, 1)]]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_decoding_sequences_spread_over_all_stages(num_stages):
    cluster = start(num_stages=num_stages, max_running=12)
    for i in range(12):
        cluster.submit(endless(f"r{i}", prompt(2, first=i)))
    for _ in range(8 * num_stages):
        cluster.step()
    sizes = [len(plan.slices) for plan in cluster.replicas[0].plans]
    assert sizes == [12 // num_stages] * num_stages


def test_a_stream_of_tiny_prompts_does_not_hold_up_decode():
    cluster = start(num_stages=2, max_running=8, num_pages=200)
    cluster.submit(endless("a", prompt(8), max_new_tokens=50))
    for i in range(60):
        cluster.submit(make_request(f"tiny{i}", prompt(2, first=i), max_new_tokens=1))
        cluster.step()
    # a token at least every num_stages steps, and the first of these 60 was the prompt
    assert len(cluster.streams["a"]) >= 60 // 2 - 1


def test_max_running_bounds_the_sequences_of_a_replica():
    cluster = start(max_running=2)
    for i in range(5):
        cluster.submit(endless(f"r{i}", prompt(4)))
    cluster.step()
    stats = cluster.core.stats()
    assert (stats.running, stats.waiting) == (2, 3)


def test_a_request_waits_until_its_pages_are_there():
    cluster = start(num_pages=6, prefix_cache=False)
    cluster.submit(endless("a", prompt(15), max_new_tokens=2))
    cluster.submit(endless("b", prompt(12), max_new_tokens=2))
    assert cluster.core.stats().waiting == 1
    cluster.drain(20)
    assert cluster.core.stats().preemptions_total == 0
    cluster.check_streams()


def test_a_newcomer_leaves_each_running_sequence_a_page_to_grow():
    cluster = start(num_pages=4, prefix_cache=False)
    cluster.submit(endless("a", prompt(7)))
    cluster.submit(endless("b", prompt(8)))
    cluster.step()
    assert in_flight(cluster) == [[(7, 1)]]  # two pages are free, but a will need one of them next


def test_the_latest_arrival_gives_way_and_loses_no_token():
    cluster = start(num_pages=8, max_step_tokens=32, prefix_cache=False)
    cluster.submit(endless("old", prompt(8), max_new_tokens=16))
    cluster.submit(endless("new", prompt(8, first=5), max_new_tokens=16))
    cluster.drain(200)
    stats = cluster.core.stats()
    assert stats.preemptions_total > 0
    assert (stats.prompt_tokens_total, stats.generation_tokens_total) == (16, 32)  # counted once all the same
    assert list(cluster.finishes) == ["old", "new"]
    cluster.check_streams()


def test_a_preempted_request_goes_on_before_any_that_arrived_later():
    # the core's own integrity check holds the queue in order of arrival after each event
    cluster = start(num_pages=8, max_step_tokens=32, prefix_cache=False)
    for i, rid in enumerate("abcd"):
        cluster.submit(endless(rid, prompt(8, first=3 * i), max_new_tokens=16))
    cluster.drain(400)
    assert cluster.core.stats().preemptions_total > 0
    assert list(cluster.finishes) == ["a", "b", "c", "d"]
    cluster.check_streams()


def test_a_lone_request_that_outgrows_the_pool_ends_by_length():
    cluster = start(num_pages=3)
    cluster.submit(endless("a", prompt(5), max_new_tokens=40))
    cluster.drain(40)
    assert (cluster.finishes["a"], len(cluster.streams["a"])) == ("length", 3 * 4 + 1 - 5)
    cluster.check_streams()


def test_a_prompt_larger_than_the_pool_ends_at_once_and_blocks_nobody():
    cluster = start(num_pages=3)
    cluster.submit(endless("huge", prompt(30)))
    assert cluster.finishes == {"huge": "length"}
    cluster.submit(endless("a", prompt(4), max_new_tokens=3))
    cluster.drain(10)
    cluster.check_streams()


# -- prefix reuse ------------------------------------------------------------------------------------------------


def test_a_known_prefix_is_not_computed_again():
    cluster = start(max_step_tokens=64)
    cluster.submit(make_request("a", prompt(20), max_new_tokens=1))
    cluster.step()
    cluster.submit(make_request("b", [*prompt(20), 3, 3], max_new_tokens=1))
    assert in_flight(cluster) == [[(20, 2)]]
    cluster.step()
    assert cluster.num_cached == {"a": 0, "b": 20}
    stats = cluster.core.stats()
    assert (stats.prefix_queries_total, stats.prefix_hits_total) == (42, 20)
    cluster.check_streams()


def test_the_last_known_token_is_always_computed():
    cluster = start(max_step_tokens=64)
    for rid in "ab":
        cluster.submit(make_request(rid, prompt(20), max_new_tokens=1))
        cluster.step()
    assert shape(cluster.plans[1]) == [(16, 4)]
    assert cluster.streams["a"] == cluster.streams["b"]


def test_pages_are_reused_only_once_their_step_is_done():
    cluster = start(num_stages=2, max_step_tokens=64)
    for rid in "ab":
        cluster.submit(make_request(rid, prompt(20), max_new_tokens=1))
    assert in_flight(cluster) == [[(0, 20)], [(0, 20)]]


def test_emitted_tokens_are_found_by_the_next_turn_of_a_conversation():
    cluster = start(max_step_tokens=64)
    cluster.submit(endless("turn1", prompt(6), max_new_tokens=7))
    cluster.drain(10)
    history = prompt(6) + cluster.streams["turn1"]
    cluster.submit(make_request("turn2", [*history, 5], max_new_tokens=1))
    cluster.step()
    assert cluster.num_cached["turn2"] == 12
    cluster.check_streams()


def test_without_the_prefix_cache_nothing_is_reused_or_counted():
    cluster = start(max_step_tokens=64, prefix_cache=False)
    for rid in "ab":
        cluster.submit(make_request(rid, prompt(20), max_new_tokens=1))
        cluster.step()
    stats = cluster.core.stats()
    assert (stats.prefix_queries_total, stats.prefix_hits_total) == (0, 0)


# -- which replica -----------------------------------------------------------------------------------------------


def test_requests_go_to_the_replica_with_the_least_work_left():
    cluster = start(num_replicas=3)
    for rid, num_new in [("a", 30), ("b", 10), ("c", 20), ("d", 1), ("e", 1)]:
        cluster.submit(endless(rid, prompt(4), max_new_tokens=num_new))
    busy = [[len(plan.slices) for plan in replica.plans] for replica in cluster.replicas]
    assert busy == [[1], [1], [1]]
    cluster.step(1)
    assert len(cluster.replicas[1].plans[0].slices) == 3  # b goes on, d and e begin


def test_a_replica_that_knows_the_prefix_wins_when_loads_are_close():
    cluster = start(num_replicas=2, max_step_tokens=64)
    cluster.submit(make_request("a", prompt(20), max_new_tokens=1))
    cluster.step(0)
    cluster.submit(endless("b", prompt(4, first=9), max_new_tokens=4))  # replica 0 is the lowest index
    cluster.submit(endless("c", prompt(20), max_new_tokens=4))
    assert cluster.num_cached["a"] == 0
    cluster.step(0)
    cluster.step(0)
    assert cluster.num_cached["c"] == 16


def test_a_known_prefix_does_not_win_against_a_much_shorter_queue():
    cluster = start(num_replicas=2, max_step_tokens=64)
    cluster.submit(make_request("a", prompt(20), max_new_tokens=1))
    cluster.step(0)
    cluster.submit(endless("b", prompt(4, first=9), max_new_tokens=40))
    cluster.submit(endless("c", prompt(20), max_new_tokens=4))
    assert in_flight(cluster, 1) == [[(0, 20)]]
