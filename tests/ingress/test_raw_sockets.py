"""Whatever is sent to the port, others are served: against a real server, with real sockets."""

import pytest

from tests.ingress import abuse

pytestmark = pytest.mark.anyio

CROWD = 1000  # idle connections; both ends are in this process, so a small limit of open files makes it fewer
FEW = 100


@pytest.mark.parametrize("name", abuse.BROKEN)
async def test_broken_http_is_refused_and_harms_nobody(world, server, name):
    async with abuse.a_stream_beside(*server):
        status = await abuse.send_broken(*server, name)
        assert status is None or status == 200 or 400 <= status < 500, status
        await abuse.assert_served(*server)
    world.engine.assert_idle()


async def test_headers_that_never_end_harm_nobody(world, server):
    async with abuse.a_stream_beside(*server), abuse.slow_headers(*server, FEW):
        await abuse.assert_served(*server)
    await abuse.assert_served(*server)
    world.engine.assert_idle()


@pytest.mark.parametrize("name", abuse.HALVES)
async def test_half_closed_streams_harm_nobody(world, server, name):
    async with abuse.a_stream_beside(*server):
        answer = await abuse.half_close(*server, abuse.HALVES[name])
        assert not answer.startswith(b"HTTP/1.1 5")
        await abuse.assert_served(*server)
    world.engine.assert_idle()


async def test_a_crowd_of_idle_connections_harms_nobody(world, server):
    async with abuse.a_stream_beside(*server), abuse.idle_connections(*server, CROWD) as count:
        assert count >= CROWD / 2, "this process may open too few files for this test"
        await abuse.assert_served(*server)
    await abuse.assert_served(*server)
    world.engine.assert_idle()
