"""A config that cannot run is refused with a sentence that names the key."""

import pytest

from serve_app.config import OctavoConfig, parse_config
from serve_app.errors import ConfigError, OctavoError
from serve_app.experts.placement import Slots
from serve_app.model.spec import read_spec
from serve_app.runtime.settings import check, max_context_tokens, slo_config, slots_of
from tests.model.families import make_tiny, make_tiny_tokenizer


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"modle": "demo"}, "`modle` is not a key of this config"),
        ({"layout": {"ep": 2}}, "`layout.ep` is not a key of this config"),
        ({"layout": {"pp": 0}}, "`layout.pp` = 0: Input should be greater than or equal to 1"),
        ({"layout": 3}, "`layout` = 3: "),
        ({"worker": {"kv_gib": -1}}, "`worker.kv_gib` = -1: "),
        ({"worker": {"primary_slots": 0}}, "`worker.primary_slots` = 0: "),
        ({"worker": {"standby_slots": -1}}, "`worker.standby_slots` = -1: "),
        ({"dtype": "float16"}, "`dtype` = 'float16': "),
        ({"scheduler": {"page_tokens": 7}}, "`scheduler.page_tokens` = 7: "),
        ({"limits": {"queued_tokens_by_replicas": {0: 5}}}, "`limits.queued_tokens_by_replicas.0.[key]` = 0: "),
        ({"limits": {"queued_tokens_by_replicas": {1: 0}}}, "`limits.queued_tokens_by_replicas.1` = 0: "),
        ({"limits": {"queued_tokens_by_replicas": 5}}, "`limits.queued_tokens_by_replicas` = 5: "),
        ({"worker": {"kv_gib": "many"}, "typo": 1}, "`worker.kv_gib` = 'many': "),
    ],
)
def test_a_bad_key_is_named(args, sentence):
    with pytest.raises(ConfigError) as caught:
        parse_config(args)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_bad_keys_are_all_named():
    with pytest.raises(ConfigError) as caught:
        parse_config({"typo": 1, "layout": {"dp": 0}})
    assert "`typo`" in str(caught.value)
    assert "`layout.dp`" in str(caught.value)


def test_a_layout_that_does_not_fit_the_model_is_refused(tmp_path):
    make_tiny("mixtral", tmp_path)
    make_tiny_tokenizer(tmp_path, 512)
    config = parse_config({"model": str(tmp_path), "layout": {"pp": 9}})
    with pytest.raises(ConfigError, match=r"the layout does not fit the model: .*9"):
        check(config)


def test_more_shards_than_attention_heads_are_refused(tmp_path):
    make_tiny("mixtral", tmp_path)
    make_tiny_tokenizer(tmp_path, 512)
    config = parse_config({"model": str(tmp_path), "layout": {"tp": 99}})
    with pytest.raises(ConfigError, match=r"the layout does not fit the model: .*99"):
        check(config)


def test_slots_too_few_for_the_experts_are_refused(tmp_path):
    make_tiny("mixtral", tmp_path)
    make_tiny_tokenizer(tmp_path, 512)
    config = parse_config({"model": str(tmp_path), "layout": {"tp": 2, "dp": 2}, "worker": {"primary_slots": 3}})
    with pytest.raises(
        ConfigError, match=r"^`worker\.primary_slots` = 3 is too few: .* x 8 experts needs .* 4 workers$"
    ):
        check(config)


@pytest.mark.parametrize(
    ("by_replicas", "sentence"),
    [
        ({1: 90, 2: 80}, r"lets 90 tokens wait for 1 replicas and 80 for 2: fewer"),
        ({2: 101}, r"lets 101 tokens wait for 2 replicas and 100 for 3: fewer"),
        ({1: 10, 3: 100}, r"names 3, and `layout\.dp` is 3: "),
    ],
)
def test_a_queue_that_would_grow_with_a_loss_is_refused(tmp_path, by_replicas, sentence):
    make_tiny("mixtral", tmp_path)
    make_tiny_tokenizer(tmp_path, 512)
    limits = {"max_queued_tokens": 100, "queued_tokens_by_replicas": by_replicas}
    config = parse_config({"model": str(tmp_path), "layout": {"dp": 3}, "limits": limits})
    with pytest.raises(ConfigError, match=r"^`limits\.queued_tokens_by_replicas` " + sentence):
        check(config)


def test_the_queue_of_a_smaller_cell_reaches_the_engine():
    limits = {"max_queued_tokens": 100, "queued_tokens_by_replicas": {"1": 20, 3: 70}}  # JSON has no other keys
    slo = slo_config(parse_config({"layout": {"dp": 4}, "limits": limits}))
    assert [slo.queued_tokens(num) for num in range(6)] == [20, 20, 20, 70, 100, 100]
    without = slo_config(parse_config({"layout": {"dp": 4}, "limits": {"max_queued_tokens": 100}}))
    assert [without.queued_tokens(num) for num in range(5)] == [100] * 5


@pytest.mark.parametrize("pp", [1, 2, 3])
def test_by_default_there_are_just_enough_slots_for_the_largest_stage(tmp_path, pp):
    make_tiny("mixtral", tmp_path)
    spec = read_spec(tmp_path)
    num_pairs = -(-spec.num_layers // pp) * spec.num_experts
    config = parse_config({"layout": {"pp": pp, "dp": 3}, "worker": {"standby_slots": 2}})
    assert slots_of(config, spec) == Slots(-(-num_pairs // 3), 2)


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(OctavoError, match="neither"):
        check(parse_config({"model": str(tmp_path / "nowhere")}))


def test_the_context_is_the_smaller_of_what_is_wanted_and_what_the_model_can(tmp_path):
    make_tiny("mixtral", tmp_path)
    make_tiny_tokenizer(tmp_path, 512)
    spec = check(parse_config({"model": str(tmp_path)}))
    for wanted, got in ((None, spec.max_positions), (10, 10), (10**9, spec.max_positions)):
        config = OctavoConfig.model_validate({"scheduler": {"max_context_tokens": wanted}})
        assert max_context_tokens(config, spec) == got
