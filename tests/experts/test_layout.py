import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.experts.layout import HeadCut, Layout, Seat, cut, cut_at, cut_heads, stage_layers

sizes = st.integers(1, 9)


@given(sizes, sizes, sizes)
def test_every_seat_is_there_once_and_every_stage_is_one_expert_group(num_stages, num_replicas, num_shards):
    layout = Layout(num_stages, num_replicas, num_shards)
    seats = layout.seats()
    assert len(set(seats)) == len(seats) == layout.num_workers == num_stages * num_replicas * num_shards
    assert seats == sorted(seats)
    for stage in range(num_stages):
        ranks = [layout.group_rank(seat) for seat in seats if seat.stage == stage]
        assert ranks == list(range(layout.group_size))


def test_the_reference_layout_folds_into_eight_leaves():
    layout = Layout(num_stages=4, num_replicas=2, num_shards=4)
    assert (layout.num_workers, layout.group_size) == (32, 8)
    assert layout.group_rank(Seat(stage=3, replica=1, shard=2)) == 6


@given(st.integers(1, 200), st.integers(1, 200))
def test_stages_cover_all_layers_in_order_and_differ_by_at_most_one(num_layers, num_stages):
    num_layers = max(num_layers, num_stages)
    stages = stage_layers(num_layers, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    counts = [len(stage) for stage in stages]
    assert len(counts) == num_stages
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts)  # the last stage also has the head
    assert counts[0] == min(counts) or min(counts[:-1]) == counts[0]  # the first one only after all inner ones


def test_left_over_layers_go_to_the_inner_stages_first():
    assert [len(stage) for stage in stage_layers(10, 4)] == [2, 3, 3, 2]
    assert [len(stage) for stage in stage_layers(11, 4)] == [3, 3, 3, 2]
    assert [len(stage) for stage in stage_layers(7, 2)] == [4, 3]


@pytest.mark.parametrize(("num_layers", "num_stages"), [(2, 3), (0, 1), (4, 0), (4, -1)])
def test_an_impossible_cut_is_refused_by_name(num_layers, num_stages):
    with pytest.raises(ValueError, match="num_stages"):
        stage_layers(num_layers, num_stages)


@pytest.mark.parametrize("name", ["num_stages", "num_replicas", "num_shards"])
def test_a_size_below_one_is_refused_by_name(name):
    sizes = {"num_stages": 1, "num_replicas": 1, "num_shards": 1, name: 0}
    with pytest.raises(ValueError, match=name):
        Layout(**sizes)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(5, 1), "num_stages=5 must not exceed the model's 4 layers"),
        (Layout(1, 1, 9), "num_shards=9 must not exceed the model's 8 attention heads"),
    ],
)
def test_a_model_that_does_not_divide_is_refused_in_one_sentence(layout, message):
    with pytest.raises(ValueError, match=message):
        layout.check_model(num_layers=4, num_heads=8)


def test_a_model_that_divides_is_welcome():
    Layout(4, 2, 2).check_model(num_layers=4, num_heads=8)


@given(st.integers(1, 300), st.integers(1, 40))
def test_a_cut_covers_everything_once_in_order_and_evenly(num, num_parts):
    parts = [cut(num, num_parts, part) for part in range(num_parts)]
    assert [thing for part in parts for thing in part] == list(range(num))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_every_query_head_sits_once_beside_the_kv_head_that_it_reads(num_kv_heads, group_size, data):
    num_heads = num_kv_heads * group_size
    num_shards = data.draw(st.integers(1, num_heads))
    cuts = [cut_heads(num_heads, num_kv_heads, num_shards, shard) for shard in range(num_shards)]
    assert sorted(head for one in cuts for head in one.queries if head is not None) == list(range(num_heads))
    assert sorted(head for one in cuts for head in one.counted_kv) == list(range(num_kv_heads))
    for one in cuts:
        assert set(one.counted_kv) <= set(one.kv_heads)
        width = one.num_heads // len(one.kv_heads)
        assert width * len(one.kv_heads) == one.num_heads
        for place, head in enumerate(one.queries):
            assert head is None or head // group_size == one.kv_heads[place // width]


def test_heads_that_divide_are_not_padded_and_kv_heads_are_replicated_where_shards_outnumber_them():
    assert cut_heads(8, 4, 2, 1) == HeadCut((4, 5, 6, 7), range(2, 4), range(2, 4))
    assert cut_heads(8, 2, 4, 2) == HeadCut((4, 5), range(1, 2), range(1, 2))
    assert cut_heads(8, 2, 4, 3) == HeadCut((6, 7), range(1, 2), range(2, 2))


def test_nine_heads_over_two_shards_are_padded():
    assert cut_heads(9, 3, 2, 0) == HeadCut((0, 1, 2, 3, None, None), range(2), range(2))
    assert cut_heads(9, 3, 2, 1) == HeadCut((4, 5, None, 6, 7, 8), range(1, 3), range(2, 3))


def test_stages_may_be_cut_by_hand():
    assert cut_at(16, [9, 7]) == [range(9), range(9, 16)]
    for counts in ([8, 9], [16, 0], [-1, 17]):
        with pytest.raises(ValueError, match="do not make up the model's 16"):
            cut_at(16, counts)
