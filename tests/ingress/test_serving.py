"""Where a body is read: beside the event loop, if that may take long."""

import asyncio
import threading

import pytest

from serve_app.ingress.serving import _read


@pytest.mark.parametrize(
    ("body", "is_beside"),
    [
        (b'{"text":"Rome"}', False),
        (b'{"text":"Rome","sampling_params":{"regex":"a"}}', True),
        (rb'{"prompt":"Rome","guided_\u006ason":{}}', True),
        (b" " * (1 << 16), True),
    ],
)
def test_a_body_that_may_bring_a_grammar_is_read_beside_the_loop_however_it_is_spelled(body, is_beside):
    reader = asyncio.run(_read(body, lambda _: threading.current_thread()))
    assert (reader is not threading.main_thread()) == is_beside
