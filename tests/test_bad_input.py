"""Bad input to a running service: it gets a clear answer, disturbs nobody, and leaves nothing behind.

Around every test requests run and must come out exact, one more does afterwards, and then every pool must be empty.
"""

import asyncio
import math
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import msgpack
import msgspec
import pytest
import pytest_asyncio
import zmq
from zmq.utils.monitor import parse_monitor_message

from gmanager import AsyncClient, CallFailed, ProtocolRefused, RequestRefused, SamplingParams, Stats
from gmanager.wire import messages as m
from gmanager.wire.codec import MAX_FRAME_BYTES, encode
from gmanager.wire.errors import FrameTooLarge
from instance.step import Grouping, Notice
from tests.support.exactness import ask, prompt
from tests.support.farm import Farm, Setup
from tests.support.processes import listening
from tests.support.service import Service, at_rest, serve
from tests.support.tiny import make_model, reference

pytestmark = pytest.mark.asyncio(loop_scope="module")

BYSTANDER_TOKENS = 40
DEADLINE_S = 10.0
ENDLESS = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes 512 tokens."""
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(farm: Farm, llama: Path) -> AsyncIterator[Service]:
    """Two instances of 256 tokens of KV."""
    async with serve(farm, 2, Setup(model=llama, kv_tokens=256)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def bystanders(service: Service, llama: Path) -> AsyncIterator[None]:
    """Requests that run all the time during a test, one after the other, and an ordinary one after it."""
    over = asyncio.Event()
    ids = prompt(llama, 60, new=BYSTANDER_TOKENS)

    async def go_on() -> None:
        while not over.is_set():
            await ask(service.client, llama, ids, new=BYSTANDER_TOKENS, spread="all")

    bystander = asyncio.create_task(go_on())
    await until(service, lambda s: any(r.state == "decode" for r in s.requests.values()))
    yield
    over.set()
    async with asyncio.timeout(DEADLINE_S):
        await bystander
        await ask(service.client, llama, prompt(llama, 17))
        await at_rest(service.client)
    service.server.validate()
    stats = await service.client.stats()
    assert [(cell.name, cell.epoch, cell.state) for cell in stats.cells] == [("main", 1, "ready")]


async def until(service: Service, condition: Callable[[Stats], bool]) -> Stats:
    async with asyncio.timeout(DEADLINE_S):
        while not condition(stats := await service.client.stats()):
            await asyncio.sleep(0.005)
    return stats


async def refusal(client: AsyncClient, given: Any, **params: Any) -> str:
    """Why a request is refused."""
    with pytest.raises(RequestRefused) as refused:
        async with asyncio.timeout(DEADLINE_S):
            async for _ in client.generate(given, SamplingParams(**params)):
                raise AssertionError("it was served")
    return str(refused.value)


# --- strangers: sockets that say what they like


class Stranger:
    """A plain ZeroMQ socket."""

    def __init__(self, dealer: "zmq.Socket[bytes]") -> None:
        self._dealer = dealer
        self._monitor: zmq.Socket[bytes] = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)

    def send(self, *frames: bytes) -> None:
        self._dealer.send_multipart(frames)

    def say(self, *messages: m.Message) -> None:
        for message in messages:
            self.send(encode(message))

    async def hear(self) -> dict[str, Any]:
        """The next answer. An empty frame is none: with it the other end looks whether this one is there."""
        frame = b""
        async with asyncio.timeout(DEADLINE_S):
            while not frame:
                while not self._dealer.poll(0):
                    await asyncio.sleep(0.002)
                frame = self._dealer.recv()
        answer: dict[str, Any] = msgpack.unpackb(frame, strict_map_key=False)
        return answer

    async def hear_of(self, kind: str) -> dict[str, Any]:
        """The next answer of a kind."""
        while (answer := await self.hear())["type"] != kind:
            pass
        return answer

    async def is_thrown_out(self) -> None:
        """Wait until the other end has closed the connection."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                while not self._monitor.poll(0):
                    await asyncio.sleep(0.002)
                if parse_monitor_message(self._monitor.recv_multipart())["event"] == zmq.EVENT_DISCONNECTED:
                    return

    def close(self) -> None:
        self._dealer.disable_monitor()
        self._monitor.close(linger=0)
        self._dealer.close(linger=0)


@asynccontextmanager
async def stranger(address: str) -> AsyncIterator[Stranger]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.RECONNECT_IVL, -1)
    speaker = Stranger(dealer)
    dealer.connect(address)
    try:
        yield speaker
    finally:
        speaker.close()
        await asyncio.to_thread(context.term)


def members(service: Service) -> list[m.Register]:
    """What the cell's instances, by rank, said when they registered."""
    return [member.register for member in service.server._cluster._cells["main"].members]


def register(service: Service, *, cell: str = "fake", **changes: Any) -> m.Register:
    """An instance's registration, as good as a real one's but for `changes`."""
    spec = {name: changes.pop(name) for name in list(changes) if name in m.InstanceSpec.__struct_fields__}
    real = members(service)[0]
    changes |= {"spec": msgspec.structs.replace(real.spec, **spec), "cell": cell}
    return msgspec.structs.replace(real, **changes)


def notice(**changes: Any) -> Notice:
    """A notice without rows, of an epoch that never was unless `changes` say which."""
    lists = ("digest", "ready", "decodes", "prefills", "released", "cancels", "handoffs", "last_tokens", "flips", "groupings")
    return Notice(
        **(
            {"epoch": 99, "lane": "prefill", "party": 0, "step": 0, "rank": 0, "both_lanes": False}
            | {"budget": 1, "paced_budget": 1, "reach": 1, "grain": 1}
            | {name: [] for name in lists}
            | changes
        )
    )


def frame(message: m.Message, **changes: Any) -> bytes:
    """A message with fields that it can't have."""
    packed: bytes = msgpack.packb(msgpack.unpackb(encode(message), strict_map_key=False) | changes)
    return packed


HELLO = m.Hello(protocol=m.PROTOCOL)
SUBMIT = m.Submit(request_id="wrong", params=SamplingParams(), token_ids=m.pack_tokens([1, 2, 3]))

GARBAGE: dict[str, tuple[list[bytes], str]] = {
    "no frame at all": ([b""], "empty frame"),
    "no msgpack": ([b"\xc1"], "not msgpack"),
    "noise": ([bytes(range(1, 256)) * 4], "bytes after the message"),
    "text": ([b"GET / HTTP/1.1\r\n\r\n"], "bytes after the message"),
    "two frames": ([encode(HELLO), encode(HELLO)], "a message of 2 frames instead of one"),
    "half a message": ([encode(HELLO)[:-1]], "frame ends in the middle of an object"),
    "more than a message": ([encode(HELLO) + b"\x00"], "1 bytes after the message"),
    "too deep": ([b"\x91" * 100_000 + b"\x90"], "nested too deeply"),
    "a length that lies": ([b"\xdd\xff\xff\xff\xff"], "exceeds max_array_len"),
    "too many entries": ([b"\xdc\xff\xff" + (b"\xdc\x00\xff" + b"\xc0" * 255) * 65535], "more than 1,048,576 entries"),
    "an ext type": ([msgpack.packb(msgpack.ExtType(1, b"x"))], "ext"),
    "no UTF-8": ([b"\x81\xa4type\xa1\xff"], "a string is not UTF-8"),
    "no map": ([msgpack.packb([1, 2])], "Expected `object`"),
    "unknown message": ([msgpack.packb({"type": "Exec", "code": "1"})], "invalid value at \\$.type"),
    "unknown field": ([frame(HELLO, secret=1)], "unknown field"),
    "missing field": ([msgpack.packb({"type": "Hello"})], "missing required field `protocol`"),
    "wrong type": ([frame(HELLO, protocol="1")], "Expected `int`, got `str`"),
    "a message to an instance": ([encode(m.Cancel(epoch=1, seq=1))], "invalid value at \\$.type"),
}
"""What no socket can read, and why."""


# --- requests that can't be served


async def test_more_tokens_than_there_is_room_for(service: Service) -> None:
    """The answer has the arithmetic."""
    client = service.client
    assert await refusal(client, [1] * 500, max_tokens=13) == (
        "prompt of 500 + max_tokens of 13 = 513 tokens; the model takes at most 512"
    )
    assert await refusal(client, [1] * 400, max_tokens=100) == (
        "prompt of 400 + max_tokens of 100 = 500 tokens: needs 500 tokens of KV; cell 'main' holds 512 (2 instances x 256), "
        "less one spare block of 16 on each"
    )
    assert await refusal(client, [1], max_tokens=2**62) == (
        f"prompt of 1 + max_tokens of {2**62:,} = {2**62 + 1:,} tokens; the model takes at most 512"
    )
    assert await refusal(client, "x" * 100_000) == (
        "prompt of 100,000 + max_tokens of 16 = 100,016 tokens; the model takes at most 512"
    )


async def test_a_prompt_that_no_frame_holds(service: Service) -> None:
    stream = service.client.generate("x" * (MAX_FRAME_BYTES + 1))
    with pytest.raises(FrameTooLarge, match=r"Submit takes 67,\d{3},\d{3} bytes on the wire; a message may take 67,108,864"):
        await anext(stream)


async def test_prompts_without_tokens_or_with_none_of_the_model(service: Service) -> None:
    client = service.client
    assert await refusal(client, []) == "the prompt is empty"
    assert await refusal(client, "") == "the prompt is empty"
    assert await refusal(client, [1, 300, 301]) == "token id 301 at position 2 is out of range: the model has 300 tokens"
    assert "token id 4294967295 at position 0 is out of range" in await refusal(client, [2**32 - 1])
    for wrong in (-1, 2**32, "x", 1.5, None, True):
        with pytest.raises((ValueError, TypeError), match=r"prompt\[1\] is"):
            client.generate([1, wrong])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="a prompt is a str or a list of token ids, got bytes"):
        client.generate(b"x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Submit can't be sent"):
        await anext(client.generate("half a \ud800 character"))
    for spread in (0, -1, "most", 1.5):
        with pytest.raises(ValueError, match="spread"):
            client.generate([1], spread=spread)  # type: ignore[arg-type]


async def test_sampling_values_that_make_no_sense(service: Service) -> None:
    """Refused where they are given, and by the gManager when a client of another make sends them."""
    params = msgspec.to_builtins(SamplingParams())
    cases: dict[str, list[Any]] = {
        "temperature": [math.nan, math.inf, -0.1],
        "top_p": [math.nan, 0.0, -1.0, 1.1],
        "top_k": [-2],
        "max_tokens": [-1],
        "logprobs": [-1, 21],
        "seed": [-1, 2**63],
        "stop": ["", [""], ["x"] * 17],
        "stop_token_ids": [[-1]],
    }
    for name, value in ((name, value) for name, values in cases.items() for value in values):
        with pytest.raises(ValueError) as here:
            SamplingParams(**{name: value})
        assert re.search(rf"{name} (must|is)|stop string", str(here.value)), here
        async with stranger(service.server.address) as client:
            client.say(HELLO)
            await client.hear_of("Welcome")
            client.send(frame(SUBMIT, params=params | {name: value}))
            assert (await client.hear_of("Refused"))["reason"] == f"can't read this: {here.value} - at `$.params`"


async def test_requests_of_a_client_of_another_make(service: Service) -> None:
    """What can't be read ends the connection, what makes no sense only the request."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"request_id": ""}, "can't read this: a request id has 1 to 256 characters, got 0"),
        ({"request_id": "x" * 257}, "can't read this: a request id has 1 to 256 characters, got 257"),
        (
            {"text": "x"},
            "can't read this: exactly one of text, token_ids and messages must be given, got ['text', 'token_ids']",
        ),
        ({"token_ids": None}, "can't read this: exactly one of text, token_ids and messages must be given, got none"),
        ({"token_ids": [1, 2]}, "can't read this: Expected `bytes | null`, got `array` - at `$.token_ids`"),
        ({"spread": 0}, "can't read this: spread must be at least 1, got 0"),
        ({"priority": 2**31}, "can't read this: priority must be in [-2**31, 2**31), got 2147483648"),
        ({"slo_ttft_s": 0}, "can't read this: slo_ttft_s must be a positive number, got 0.0"),
        ({"slo_tpot_s": float("nan")}, "can't read this: slo_tpot_s must be a positive number, got nan"),
        ({"urgency": 1}, "can't read this: unknown field"),
        ({"params": {"best_of": 2}}, "can't read this: unknown field at $.params"),
        ({"params": {"max_tokens": 1.5}}, "can't read this: Expected `int | null`, got `float` - at `$.params.max_tokens`"),
        ({"token_ids": b"xyz"}, "token ids must be a multiple of 4 bytes long, got 3"),
        ({"token_ids": b""}, "the prompt is empty"),
    ]
    for changes, reason in cases:
        async with stranger(service.server.address) as client:
            client.say(HELLO)
            await client.hear_of("Welcome")
            client.send(frame(SUBMIT, **changes))
            answer = await client.hear()
            if reason.startswith("can't read this"):
                assert (answer["type"], answer["reason"]) == ("Refused", reason)
            else:
                assert (answer["type"], answer["refusal"], answer["error"]) == ("Output", "invalid", reason)
                client.say(m.GetStats(call=1))
                await client.hear_of("StatsReply")


async def test_ids_in_use(service: Service, llama: Path) -> None:
    ids = prompt(llama, 30, new=BYSTANDER_TOKENS)
    params = SamplingParams(max_tokens=BYSTANDER_TOKENS, temperature=0, ignore_eos=True)
    stream = service.client.generate(ids, params, request_id="taken", spread=1)
    tokens = (await anext(stream)).token_ids
    with pytest.raises(RequestRefused, match="request id 'taken' is in use by this client"):
        await anext(service.client.generate([1], request_id="taken"))
    async with AsyncClient(service.server.address) as other:
        with pytest.raises(RequestRefused, match="request id 'taken' is in use by another request, which has not ended"):
            await anext(other.generate([1], request_id="taken"))
        with pytest.raises(CallFailed, match="this client has no request 'taken'"):
            await other.abort("taken")
        with pytest.raises(CallFailed, match="this client has no request 'taken'"):
            await other.move_home("taken", 0)
    tokens += [token async for chunk in stream for token in chunk.token_ids]
    assert tokens == reference(llama, tuple(ids), BYSTANDER_TOKENS).token_ids
    async for chunk in service.client.generate(ids, params, request_id="taken"):  # an id that has ended is free again
        assert chunk.finish_reason in (None, "length")


async def test_calls_for_what_is_not_there(service: Service) -> None:
    client = service.client
    for call in (client.abort("nobody"), client.move_home("nobody", 0)):
        with pytest.raises(CallFailed, match="this client has no request 'nobody'"):
            await call
    stream = client.generate([1] * 20, ENDLESS, request_id="here")
    await anext(stream)
    for rank in (2, 7, -1, 2**40):
        with pytest.raises(CallFailed, match=f"there is no instance {rank}; cell 'main' has 0, 1"):
            await client.move_home("here", rank)
    with pytest.raises(ValueError, match="Expected `int`"):
        await client.move_home("here", "0")  # type: ignore[arg-type]
    await client.abort("here")
    assert [chunk.finish_reason async for chunk in stream][-1] == "abort"
    for call in (client.abort("here"), client.move_home("here", 0)):
        with pytest.raises(CallFailed, match="request 'here' has ended"):
            await call


# --- the gManager's socket


@pytest.mark.parametrize("greeted", [False, True], ids=["a stranger", "a client"])
async def test_garbage_to_the_gmanager(service: Service, greeted: bool) -> None:
    """Whoever sends it is told why; if it is a client its requests end."""
    for name, (frames, reason) in GARBAGE.items():
        async with stranger(service.server.address) as client:
            if greeted:
                request = m.Submit(request_id=name, params=ENDLESS, token_ids=m.pack_tokens([1] * 20), spread="all")
                client.say(HELLO, request)
                await client.hear_of("Output")
            client.send(*frames)
            answer = await client.hear_of("Refused")
            assert answer["reason"].startswith("can't read this: ") and re.search(reason, answer["reason"]), (name, answer)
        if greeted:
            stats = await until(service, lambda s, name=name: s.requests[name].state == "finished")  # type: ignore[misc]
            assert stats.requests[name].finish_reason == "abort"


async def test_first_messages_that_are_none(service: Service) -> None:
    cases: list[tuple[m.Message, str, str]] = [
        (m.Hello(protocol=m.PROTOCOL + 1), "Refused", f"it speaks protocol {m.PROTOCOL + 1}, this gManager {m.PROTOCOL}"),
        (m.GetStats(call=1), "Refused", "the first message must be Hello or Register, not GetStats"),
        (SUBMIT, "Refused", "the first message must be Hello or Register, not Submit"),
        (m.Ping(), "Refused", "the first message must be Hello or Register, not Ping"),
        (m.Beat(epoch=1, free_blocks=9, held_tokens={1: 0}, counters=m.Counters()), "Expelled", "is not registered here"),
        (m.Released(epoch=77, seq=1, generated=0), "Expelled", "is not registered here"),
        (m.Joined(epoch=2**40), "Expelled", "is not registered here"),
    ]
    for message, kind, reason in cases:
        async with stranger(service.server.address) as peer:
            peer.say(message)
            answer = await peer.hear()
            assert answer["type"] == kind and reason in answer["reason"], (message, answer)


async def test_a_client_that_speaks_as_an_instance(service: Service) -> None:
    async with stranger(service.server.address) as client:
        client.say(HELLO, m.Joined(epoch=1))
        assert (await client.hear_of("Refused"))["reason"] == "a client doesn't send Joined"


async def test_instances_that_can_not_be_members(service: Service) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"protocol": m.PROTOCOL + 1}, f"it speaks protocol {m.PROTOCOL + 1}, this gManager {m.PROTOCOL}"),
        ({"cell": "main", "fingerprint": "c0de"}, "that of cell 'main' is"),
        ({"cell": "main", "cell_size": 3}, "its cell size is 3, that of cell 'main' is 2"),
        ({"cell": ""}, "a cell's name has 1 to 64 printable characters"),
        ({"cell": "x\x1b[2J"}, "a cell's name has 1 to 64 printable characters"),
        ({"cell_size": 0}, "cell size must be between 1 and 4096, got 0"),
        ({"cell_size": 2**40}, "cell size must be between 1 and 4096"),
        ({"rank": -1}, "RANK must not be negative"),
        ({"wanted_id": -1}, "an instance's number must be in [0, 4096), got -1"),
        ({"wanted_id": 4096}, "an instance's number must be in [0, 4096), got 4096"),
        ({"host": "x" * 65}, "a host is named with at most 64 characters, got 65"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"block_size": -16}, "block_size must be at least 1, got -16"),
    ]
    for changes, reason in cases:
        async with stranger(service.server.address) as instance:
            instance.say(register(service, **changes))
            answer = await instance.hear()
            assert answer["type"] == "Refused" and reason in answer["reason"], (changes, answer)


@pytest.mark.parametrize("way", ["garbage", "no tokenizer", "other epochs", "out of turn"])
async def test_instances_that_misbehave_end_only_their_own_cell(
    service: Service, way: Literal["garbage", "no tokenizer", "other epochs", "out of turn"]
) -> None:
    async with stranger(service.server.address) as instance:
        instance.say(register(service, cell=way, cell_size=1, run_id="fake"))
        await instance.hear_of("Registered")
        epoch = (await instance.hear_of("OpenStore"))["epoch"]
        assert epoch > 1
        dropped = (await service.client.stats()).counters.dropped_messages
        if way == "garbage":
            instance.send(b"\xc1")
            assert "can't read this: not msgpack" in (await instance.hear_of("Refused"))["reason"]
        elif way == "no tokenizer":
            assets = m.TextAssets(tokenizer_json="{", chat_template=None, special_tokens={}, eos_token_ids=[])
            instance.say(m.Text(assets=assets))
            reason = (await instance.hear_of("EndEpoch"))["reason"]
            assert "the tokenizer of cell 'no tokenizer' can't be used" in reason
        elif way == "other epochs":
            # of another cell: no message may pass for one of its instances
            instance.say(
                m.Outputs(epoch=1, outputs=[m.SequenceOutput(seq=1, index=0, token_ids=[7], finish_reason="stop")]),
                m.Beat(epoch=1, free_blocks=0, held_tokens={1: 10**9}, counters=m.Counters()),
                m.Granted(epoch=1, seq=1, blocks=1, free_blocks=0),
                m.Joined(epoch=1),
                m.Leave(reason="enough", failed=True),
            )
            await until(service, lambda s: s.counters.dropped_messages >= dropped + 4)
        else:
            instance.say(
                m.NeedBlock(epoch=epoch, seq=1),
                m.HomeMoved(epoch=epoch, seq=1, home=5),
                m.Released(epoch=epoch, seq=1, generated=3),
                m.Joined(epoch=epoch),
                m.Leave(reason="enough", failed=True),
            )
            await until(service, lambda s: s.counters.dropped_messages >= dropped + 3)
        await until(service, lambda s: [cell.name for cell in s.cells] == ["main"])


# --- the instances' sockets


@pytest.mark.parametrize("rank", [0, 1])
async def test_garbage_to_an_instance(service: Service, rank: int) -> None:
    """It is dropped and counted, and so are notices of other epochs and of instances that the cell doesn't have."""
    before = (await service.client.stats()).instances[rank].counters.dropped_messages
    strange = [*(frames for frames, _ in GARBAGE.values())]
    strange += [[encode(HELLO)], [frame(notice(), secret=1)], [frame(notice(), rank="0")]]
    strange += [
        [encode(notice())],
        [encode(notice(epoch=2, groupings=[Grouping(number=10**6, members=[0, 1])]))],
        [encode(notice(epoch=1, rank=99))],
        [encode(notice(epoch=1, rank=-1))],
    ]
    async with stranger(members(service)[rank].party_address) as client:
        for frames in strange:
            client.send(*frames)
        counted = await until(service, lambda s: s.instances[rank].counters.dropped_messages >= before + len(strange))
    assert counted.instances[rank].counters.dropped_messages == before + len(strange)


async def test_frames_over_the_limit(service: Service) -> None:
    """The connection ends before the frame is read; a client's requests go on, for it to come back."""
    for instance in members(service):
        async with stranger(instance.party_address) as peer:
            peer.send(bytes(MAX_FRAME_BYTES + 1))
            await peer.is_thrown_out()
    async with stranger(service.server.address) as client:
        client.say(HELLO, m.Submit(request_id="over", params=ENDLESS, token_ids=m.pack_tokens([1] * 20), spread="all"))
        await client.hear_of("Output")
        client.send(bytes(MAX_FRAME_BYTES + 1))
        await client.is_thrown_out()
        before = (await service.client.stats()).requests["over"].generated_tokens
        stats = await until(service, lambda s: before < s.requests["over"].generated_tokens or before == ENDLESS.max_tokens)
        assert stats.requests["over"].finish_reason in (None, "length")
        stream = service.client.attach("over")
        assert (await anext(stream)).index == 0
        await stream.aclose()


async def test_noise_on_every_port(service: Service, farm: Farm, llama: Path) -> None:
    """Other protocols, and connections that say nothing, on the sockets of ZeroMQ, of the TCPStore and of Gloo."""
    port = int(service.server.address.rpartition(":")[2])
    ports = {("127.0.0.1", port)}
    for worker in farm.workers[:2]:
        assert worker.process.pid is not None
        found = listening(worker.process.pid)
        assert len(found) >= 2, "its party's and Gloo's"
        ports |= found
    silent = [socket.create_connection(address, timeout=5) for address in sorted(ports)]
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 4096, b"\xff" * 4096, bytes(range(256)) * 16, b"\x16\x03\x01\x02\x00"):
        for address in sorted(ports):
            with socket.create_connection(address, timeout=5) as raw:
                raw.sendall(noise)
    await ask(service.client, llama, prompt(llama, 33), spread="all")
    for quiet in silent:
        quiet.close()


# --- a client at the wrong door


async def test_an_address_that_is_no_gmanager(service: Service) -> None:
    party = members(service)[0].party_address
    with pytest.raises(ProtocolRefused, match=f"what answers at {party} is no gManager that this client understands"):
        async with AsyncClient(party):
            pass
