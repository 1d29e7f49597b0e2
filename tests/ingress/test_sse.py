"""The data of an event is one line to every client, whatever the model says."""

import json

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from serve_app.ingress.sse import Progress, sse_event


@given(st.text())
@example("one\u2028two\u2029three\x85four\x0b\x0c\x1c\x1d\x1e\r\nfive")
def test_an_event_is_one_line_and_says_the_same(text):
    event = sse_event(msgspec.json.encode({"text": text}), "3,0").decode()
    assert event.endswith("\n\n")
    name, data, empty = event.splitlines()
    assert (name, empty) == ("id: 3,0", "")
    assert json.loads(data.removeprefix("data: ")) == {"text": text}


def test_an_event_without_an_id_leaves_the_last_one_as_it_is():
    assert sse_event(b"[DONE]") == b"data: [DONE]\n\n"


def test_ids_never_go_back():
    progress = Progress([5, 0], is_resumed=True)
    assert [progress.is_news(0, 5), progress.is_news(0, 6), progress.is_news(1, 0)] == [False, True, True]
    assert [progress.is_news(0, num_tokens, is_end=True) for num_tokens in (4, 5, 6)] == [True, False, True]
    assert [progress.advance(1, 1), progress.advance(0, 3), progress.advance(0, 7)] == ["5,1", "5,1", "7,1"]
