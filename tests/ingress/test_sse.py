"""An event is one line to every client, whatever the model says."""

import json

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from serve_app.ingress.sse import sse_event


@given(st.text())
@example("one\u2028two\u2029three\x85four\x0b\x0c\x1c\x1d\x1e\r\nfive")
def test_an_event_is_one_line_and_says_the_same(text):
    event = sse_event(msgspec.json.encode({"text": text})).decode()
    assert event.endswith("\n\n")
    assert event.splitlines() == [event.removesuffix("\n\n"), ""]
    assert json.loads(event.removeprefix("data: ")) == {"text": text}
