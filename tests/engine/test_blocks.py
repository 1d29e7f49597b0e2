import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.blocks import PagePool, extend_chain

P = 4


def chain_of(tokens):
    chain = []
    extend_chain(chain, tokens, P, len(tokens) // P)
    return chain


def cache(pool, tokens):
    """Hold, publish and release the full pages of `tokens`, as a sequence that came and went."""
    chain = chain_of(tokens)
    cached = pool.match(chain)
    pool.hold(cached)
    pages = cached + pool.allocate(len(chain) - len(cached))
    for page, digest in zip(pages, chain, strict=True):
        pool.publish(page, digest)
    pool.release(pages)
    pool.check_integrity()
    return pages


def test_what_is_taken_is_given_back():
    pool = PagePool(3)
    pages = pool.allocate(3)
    assert sorted(pages) == [0, 1, 2]
    assert (pool.num_held, pool.num_available) == (3, 0)
    assert not pool.can_allocate(1)
    pool.release(pages)
    assert (pool.num_held, pool.num_available) == (0, 3)
    pool.check_integrity()


def test_a_page_stays_held_until_its_last_holder_lets_go():
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.hold(pages)
    pool.release(pages)
    assert pool.num_held == 1
    pool.release(pages)
    assert pool.num_held == 0
    pool.check_integrity()


def test_a_prefix_is_found_page_by_page_until_the_tokens_differ():
    pool = PagePool(8)
    pages = cache(pool, list(range(12)))
    assert pool.match(chain_of([*range(8), 99, 9, 10, 11])) == pages[:2]
    assert pool.match(chain_of([*range(12), 12, 13, 14, 15])) == pages


def test_equal_tokens_after_another_beginning_are_not_the_same_page():
    pool = PagePool(8)
    cache(pool, [1, 1, 1, 1, 5, 6, 7, 8])
    assert pool.match(chain_of([2, 2, 2, 2, 5, 6, 7, 8])) == []
    assert pool.match(chain_of([5, 6, 7, 8])) == []


def test_the_end_of_the_longest_unused_prefix_is_forgotten_first():
    pool = PagePool(4)
    old, new = cache(pool, [1] * 8), cache(pool, [2] * 8)
    assert pool.allocate(1) == [old[1]]
    assert pool.match(chain_of([1] * 8)) == old[:1]
    assert pool.match(chain_of([2] * 8)) == new
    pool.check_integrity()


def test_a_prefix_in_use_is_not_forgotten():
    pool = PagePool(4)
    old, new = cache(pool, [1] * 8), cache(pool, [2] * 8)
    pool.hold(old)
    assert pool.can_allocate(2)
    assert not pool.can_allocate(3)
    assert sorted(pool.allocate(2)) == sorted(new)
    assert pool.match(chain_of([1] * 8)) == old
    pool.check_integrity()


def test_cached_pages_that_are_about_to_be_held_cannot_be_allocated_too():
    pool = PagePool(4)
    cached = cache(pool, [1] * 8)
    assert pool.can_allocate(2, beside=cached)
    assert not pool.can_allocate(3, beside=cached)
    pool.hold(cached)
    assert pool.can_allocate(2, beside=cached)


def test_of_two_equal_pages_one_is_known_and_the_other_becomes_free():
    pool = PagePool(2)
    first, second = pool.allocate(1), pool.allocate(1)
    digest = chain_of([3] * P)[0]
    pool.publish(first[0], digest)
    pool.publish(second[0], digest)
    assert pool.match([digest]) == first
    pool.release(second)
    pool.release(first)
    assert pool.allocate(1) == second
    pool.check_integrity()


def test_a_page_released_twice_is_a_bug_that_shows():
    pool = PagePool(1)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError):
        pool.release(pages)


@given(st.lists(st.integers(0, 2), min_size=4, max_size=24), st.lists(st.integers(0, 2), min_size=4, max_size=24))
def test_chains_agree_exactly_as_far_as_the_tokens_do(left, right):
    for i, (a, b) in enumerate(zip(chain_of(left), chain_of(right), strict=False)):
        assert (a == b) == (left[: (i + 1) * P] == right[: (i + 1) * P])


@given(st.lists(st.integers(0, 2), min_size=24, max_size=24), st.integers(0, 6))
def test_a_chain_grown_in_parts_is_the_same_chain(tokens, num_first):
    chain = []
    extend_chain(chain, tokens, P, num_first)
    extend_chain(chain, tokens, P, 6)
    assert chain == chain_of(tokens)
