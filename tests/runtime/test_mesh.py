"""The mesh, over real sockets."""

import queue
import threading

import pytest
import torch
import zmq

from serve_app.runtime.frames import read_tensor, tensor_frame, tensor_header
from serve_app.runtime.mesh import CellKey, Mesh
from serve_app.runtime.wire import ExpertReply, Joined, Phase, Stop

WAIT_S = 20.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 7), (0, 7), (1, 1)])
def test_a_tensor_arrives_bit_for_bit(dtype, shape):
    x = torch.randn(shape).to(dtype)
    with Mesh() as here, Mesh() as there:
        here.connect("there", there.address)
        here.send("there", ExpertReply(3, 9, *tensor_header(x)), tensor_frame(x))
        message, frame = there.receive(WAIT_S)
        assert (message.epoch, message.call) == (3, 9)
        assert torch.equal(read_tensor(message, frame, torch.device("cpu")), x)


def test_messages_of_one_sender_keep_their_order():
    with Mesh() as here, Mesh() as there:
        here.connect("there", there.address)
        for epoch in range(500):
            here.send("there", Joined(epoch, "w"))
        assert [there.receive(WAIT_S).message.epoch for _ in range(500)] == list(range(500))


def test_a_peer_that_is_not_there_blocks_nobody():
    with Mesh() as here:
        here.connect("nobody", "tcp://127.0.0.1:9")
        for _ in range(20_000):
            here.send("nobody", Stop())
        assert here.num_dropped > 0
        here.send("never heard of", Stop())


def test_what_is_not_ours_is_dropped_and_counted():
    with Mesh() as mesh, zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
        stranger.connect(mesh.address)
        not_utf8, too_deep = b"\x92\xa5phase\xa1\xff", b"\x93\xa5phase\xa1x" + b"\x91" * 100_000
        garbage = (b"", b"\xff\xff", b"hello", b"\x92\xa4plan\x01", not_utf8, too_deep)
        for message in garbage:
            stranger.send(message)
        stranger.send_multipart([b"not msgpack", b"frame"])
        for _ in range(len(garbage) + 1):
            assert mesh.receive(WAIT_S) is None
        assert mesh.num_dropped == len(garbage) + 1


def test_a_frame_that_does_not_fit_its_header_is_refused():
    cpu = torch.device("cpu")
    for dtype, shape, frame, why in (
        ("float32", (4,), b"x" * 12, "12 bytes where 16"),
        ("float32", (-1, -4), b"x" * 16, "16 bytes where 16"),
        ("float32", (1 << 40,), b"x" * 16, "16 bytes where"),
        ("object", (4,), b"x" * 16, "unknown dtype"),
        ("float32", (4,), None, "no tensor frame"),
    ):
        with pytest.raises(ValueError, match=why):
            read_tensor(ExpertReply(1, 1, dtype, shape), frame and memoryview(frame), cpu)


def test_off_loopback_a_key_is_required():
    with pytest.raises(ValueError, match="needs the cell's key"):
        Mesh("0.0.0.0")


def test_only_holders_of_the_cell_key_are_heard():
    key, other = CellKey.make(), CellKey.make()
    with Mesh(key=key) as inbox, Mesh(key=key) as friend, Mesh(key=other) as enemy, Mesh() as plain:
        for stranger in (enemy, plain):
            stranger.connect("inbox", inbox.address)
            stranger.send("inbox", Phase("let me in"))
        # One that even knows the cell's public key has no client key that ZAP accepts.
        socket = enemy._context.socket(zmq.PUSH)
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = *other, key.public
        socket.set(zmq.LINGER, 0)
        socket.connect(inbox.address)
        socket.send(b"\x92\xa5phase\xa9let me in")
        friend.connect("inbox", inbox.address)
        friend.send("inbox", Phase("a friend"))
        assert inbox.receive(WAIT_S).message == Phase("a friend")
        assert inbox.receive(1.0) is None
        assert inbox.num_dropped == 0
        socket.close(0)


@pytest.mark.parametrize("key", [None, CellKey.make()])
def test_a_watcher_hears_of_each_connection_that_is_made_or_broken(key):
    heard = queue.Queue()
    with Mesh(key=key) as here:
        here.watch("there", lambda *link: heard.put(link))
        for _ in range(2):
            with Mesh(key=key) as there:
                here.connect("there", there.address)
                assert heard.get(timeout=WAIT_S) == (there.address, True)
            assert heard.get(timeout=WAIT_S) == (there.address, False)
        with Mesh(key=key) as other:
            here.connect("other", other.address)
            here.send("other", Stop())
            assert other.receive(WAIT_S).message == Stop()
    assert heard.empty()


def test_nobody_goes_on_watching_a_socket_that_is_closed():
    with Mesh() as here, Mesh() as there:
        here.watch("there", lambda *_: None)
        here.connect("there", there.address)
        [watching] = [thread for thread in threading.enumerate() if thread.name == "mesh-watch"]
        here.disconnect("there")
        watching.join(WAIT_S)
        assert not watching.is_alive()
