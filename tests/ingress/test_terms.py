"""What a request may ask for by its headers, and how a refusal is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import SloConfig
from serve_app.ingress.faults import BadInputError, RefusedError
from serve_app.ingress.terms import MAX_TIMEOUT_MS, REASON_HEADER, Policy

POLICY = Policy(SloConfig())


def test_who_asks_for_nothing_has_the_defaults():
    terms = POLICY.terms({}, "me")
    assert (terms.tenant, terms.share, terms.ttft_s, terms.drops_late) == ("me", 0.9, 0.0, False)
    assert not terms.is_accepted and terms.waited_s == 0.0
    assert POLICY.timeout_s({}) is None


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-llm-d-slo-ttft-ms"])
def test_an_objective_is_in_milliseconds(name):
    assert POLICY.terms({name: "2500"}).ttft_s == 2.5


@pytest.mark.parametrize(
    "headers",
    [
        {"x-slo-ttft-ms": "1"},
        {"x-slo-ttft-ms": "1e9"},
        {"x-slo-ttft-ms": "nan"},
        {"x-slo-ttft-ms": "-100"},
        {"x-slo-ttft-ms": "soon"},
        {"x-llm-d-slo-ttft-ms": "inf"},
        {"x-octavo-priority": "urgent"},
        {"x-octavo-late": "never"},
    ],
)
def test_what_is_not_allowed_is_named(headers):
    with pytest.raises(BadInputError, match=next(iter(headers))):
        POLICY.terms(headers)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "later", str(MAX_TIMEOUT_MS + 1)])
def test_so_is_a_timeout(text):
    with pytest.raises(BadInputError, match="x-request-timeout-ms"):
        POLICY.timeout_s({"x-request-timeout-ms": text})


def test_a_timeout_is_in_milliseconds():
    assert POLICY.timeout_s({"x-request-timeout-ms": "1500"}) == 1.5


@pytest.mark.parametrize(("name", "share"), SloConfig().priorities.items())
def test_each_priority_has_its_share(name, share):
    assert POLICY.terms({"x-octavo-priority": name}).share == share


def test_late_ones_may_be_dropped():
    assert POLICY.terms({"x-octavo-late": "drop"}).drops_late
    assert not POLICY.terms({"x-octavo-late": "serve"}).drops_late


@given(st.text(max_size=40))
def test_no_header_is_an_internal_error(text):
    for name in ("x-slo-ttft-ms", "x-octavo-priority", "x-octavo-late", "x-request-timeout-ms"):
        try:
            POLICY.terms({name: text})
            POLICY.timeout_s({name: text})
        except BadInputError as error:
            assert name in str(error)


@pytest.mark.parametrize(
    ("reason", "configured", "status"),
    [("ttft", 429, 429), ("ttft", 503, 503), ("no-capacity", 429, 503), ("draining", 529, 503)],
)
def test_a_refusal_tells_why_and_when(reason, configured, status):
    error = RefusedError(reason, "not now", 2.2)
    headers = Policy(SloConfig(refusal_status=configured)).refuse(error)
    assert error.status == status
    assert headers == {REASON_HEADER: reason, "retry-after": "3", "retry-after-ms": "3000"}


def test_what_never_can_be_has_no_time():
    error = RefusedError("ttft-unreachable", "too long", 0.0)
    assert POLICY.refuse(error) == {REASON_HEADER: "ttft-unreachable"}
