"""Bad input to a running service: it is answered clearly, disturbs nobody, and leaves nothing behind.

A request decodes while the strangers speak, and must come out exact; `serve` checks at the end that every pool is empty.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from gmanager import AsyncClient, CallFailed, RequestRefused, SamplingParams
from gmanager.wire import messages as m
from gmanager.wire.codec import MAX_FRAME_BYTES, encode
from tests.support.exactness import ask, prompt
from tests.support.farm import Farm, Setup
from tests.support.service import Service, serve
from tests.support.tiny import make_model

NEW = 60


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
async def service(farm: Farm, llama: Path) -> AsyncIterator[Service]:
    prompt(llama, 60, new=NEW)  # the reference is computed before the service runs
    async with serve(farm, 2, Setup(model=llama, kv_tokens=256)) as running:
        yield running


@pytest.fixture
async def bystander(service: Service, llama: Path) -> AsyncIterator[None]:
    """A request that runs during the test and must come out right."""
    running = asyncio.create_task(ask(service.client, llama, prompt(llama, 60, new=NEW), new=NEW, spread="all"))
    yield
    await running


async def refusal(client: AsyncClient, ids: Any, **params: Any) -> str:
    with pytest.raises(RequestRefused) as refused:
        async for _ in client.generate(ids, SamplingParams(**params)):
            pass
    return str(refused.value)


async def test_requests_that_make_no_sense(service: Service, bystander: None) -> None:
    client = service.client
    assert await refusal(client, [1] * 500, max_tokens=13) == (
        "prompt of 500 + max_tokens of 13 = 513 tokens; the model takes at most 512"
    )
    assert await refusal(client, [1] * 400, max_tokens=100) == (
        "prompt of 400 + max_tokens of 100 = 500 tokens: needs 500 tokens of KV; cell 'main' holds 512 (2 instances x 256), "
        "less one spare block of 16 on each"
    )
    assert "empty" in await refusal(client, [])
    assert "empty" in await refusal(client, "")
    assert await refusal(client, [1, 300]) == "token id 300 at position 1 is out of range: the model has 300 tokens"
    for wrong in (-1, 2**32, "x", 1.5):
        with pytest.raises((ValueError, TypeError), match="token"):
            client.generate([1, wrong])  # type: ignore[list-item]
    for name, value in (
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("top_p", float("nan")),
        ("top_p", 0.0),
        ("top_k", -2),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            SamplingParams(**{name: value})
    for name, value in (("max_tokens", 0), ("logprobs", -1), ("seed", -1)):
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: value})
    with pytest.raises(CallFailed, match="this client has no request 'nobody'"):
        await client.abort("nobody")
    with pytest.raises(CallFailed, match="this client has no request 'nobody'"):
        await client.move_home("nobody", 0)


async def test_an_id_in_use_and_a_home_that_is_none(service: Service, llama: Path, bystander: None) -> None:
    params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    stream = service.client.generate(prompt(llama, 20), params, request_id="taken")
    await anext(stream)
    async with AsyncClient(service.server.address) as other:
        with pytest.raises(RequestRefused, match="request id 'taken' is in use"):
            await anext(other.generate([1], request_id="taken"))
        with pytest.raises(CallFailed, match="this client has no request 'taken'"):
            await other.abort("taken")
    with pytest.raises(CallFailed, match="there is no instance 7; cell 'main' has 0 to 1"):
        await service.client.move_home("taken", 7)
    assert (await anext(stream)).token_ids
    await service.client.abort("taken")
    assert [chunk.finish_reason async for chunk in stream][-1] == "abort"


def hostile_frames() -> dict[str, bytes]:
    hello: dict[str, Any] = msgpack.unpackb(encode(m.Hello(protocol=m.PROTOCOL)))
    return {
        "noise": bytes(range(256)) * 4,
        "empty": b"",
        "unknown type": msgpack.packb({"type": "Exec", "code": "1"}),
        "unknown field": msgpack.packb(hello | {"secret": 1}),
        "wrong type": msgpack.packb(hello | {"protocol": "one"}),
        "too deep": b"\x91" * 100_000 + b"\x90",
        "lying length": b"\xdd\xff\xff\xff\xff",
        "extension": msgpack.packb(msgpack.ExtType(1, b"x")),
        "over the limit": b"\xc6" + struct.pack(">I", MAX_FRAME_BYTES) + bytes(MAX_FRAME_BYTES),
        "other protocol": msgpack.packb(hello | {"protocol": m.PROTOCOL + 1}),
        "no greeting": encode(m.GetStats(call=1)),
        "for an instance": encode(m.Cancel(epoch=1, seq=1)),
        "of an instance of another epoch": encode(m.Released(epoch=77, seq=1, generated=0)),
    }


@pytest.mark.parametrize("socket_of", ["gManager", "party"])
async def test_garbage_on_every_socket(service: Service, socket_of: str, bystander: None) -> None:
    address = service.server.address
    if socket_of == "party":
        (address, _) = (member.register.party_address for _, member in service.server._cluster._members.values())
    context = zmq.Context()
    try:
        for name, frame in hostile_frames().items():
            dealer = context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.LINGER, 1000)
            dealer.connect(address)
            dealer.send(frame)
            if socket_of == "gManager" and name in ("noise", "unknown field", "other protocol", "no greeting"):
                async with asyncio.timeout(10):
                    while not dealer.poll(0):
                        await asyncio.sleep(0.01)
                answer = msgpack.unpackb(dealer.recv())
                assert answer["type"] == "Refused", (name, answer)
                assert answer["reason"]
            dealer.send_multipart([b"two", b"frames"])
            await asyncio.sleep(0.02)
            dealer.close()
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        for line in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b""):
            with socket.create_connection((host, int(port)), timeout=5) as raw:
                raw.sendall(line)
    finally:
        await asyncio.to_thread(context.destroy, 1000)
    assert (await service.client.stats()).cells[0].state == "ready"
