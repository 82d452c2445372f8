"""The channel by which a cell's reply comes."""

import asyncio
import queue
import time

import pytest
import zmq
import zmq.asyncio
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.session import Session

from companion import kernels

LATER = 0.05  # seconds, for what is on its way inside this process


async def reply_whose_signal_is_swallowed(make: type, patience_seconds: float) -> dict:
    """A reply comes while a coroutine waits for it, and something else looks at the socket first."""
    context, session = zmq.asyncio.Context(), Session(key=b"")
    try:
        kernel, client = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        kernel.bind("inproc://kernel")
        client.connect("inproc://kernel")
        waits = asyncio.ensure_future(make(client, session).get_msg(timeout=60))
        await asyncio.sleep(LATER)
        session.send(kernel, "execute_reply", {"status": "ok"})
        time.sleep(LATER)
        zmq.Socket.shadow(client.underlying).getsockopt(zmq.EVENTS)  # what sending past asyncio does
        return await asyncio.wait_for(waits, patience_seconds)
    finally:
        context.destroy(linger=0)


def test_a_reply_is_found_although_its_signal_was_swallowed():
    patience_seconds = 5 + kernels.LOOK_SECONDS
    found = asyncio.run(reply_whose_signal_is_swallowed(kernels.shell_channel(), patience_seconds))
    assert found["content"] == {"status": "ok"}


def test_without_that_it_is_not_found():
    with pytest.raises(TimeoutError):
        asyncio.run(reply_whose_signal_is_swallowed(AsyncZMQSocketChannel, 2 * kernels.LOOK_SECONDS))


def test_a_kernel_that_says_nothing_is_waited_for_as_long_as_was_asked():
    async def silence() -> float:
        context, began = zmq.asyncio.Context(), time.monotonic()
        channel = kernels.shell_channel()(context.socket(zmq.PAIR), Session(key=b""))
        with pytest.raises(queue.Empty):
            await channel.get_msg(timeout=1.2 * kernels.LOOK_SECONDS)
        context.destroy(linger=0)
        return time.monotonic() - began

    assert asyncio.run(silence()) >= 1.2 * kernels.LOOK_SECONDS
