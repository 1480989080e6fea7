"""The codec: every message survives the way there and back, and nothing else gets through."""

import math
import re
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmanager.wire import codec
from gmanager.wire import messages as m
from gmanager.wire.codec import Decoder, encode
from gmanager.wire.errors import BadMessage, FrameTooLarge

UNIONS: dict[str, Any] = {
    "FromClient": m.FromClient,
    "ToClient": m.ToClient,
    "FromInstance": m.FromInstance,
    "ToInstance": m.ToInstance,
}
CLASSES = [(name, kind) for name, union in UNIONS.items() for kind in union.__args__]

counts = st.integers(0, 2**63 - 1)
wire_ints = st.integers(-(2**63), 2**64 - 1)
texts = st.text(max_size=20)
ids_bytes = st.lists(st.integers(0, 2**32 - 1), max_size=8).map(m.pack_tokens)

params = st.builds(
    m.SamplingParams,
    max_tokens=st.integers(1, 2**31),
    temperature=st.floats(0, 10),
    top_k=st.integers(-1, 1000),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.none() | counts,
    stop=st.none() | st.text(min_size=1, max_size=5) | st.lists(st.text(min_size=1, max_size=5), max_size=3),
    stop_token_ids=st.none() | st.lists(st.integers(0, 2**32 - 1), max_size=4),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, m.MAX_LOGPROBS),
    prompt_logprobs=st.none() | st.integers(0, m.MAX_LOGPROBS),
    min_p=st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0, 10, exclude_min=True),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-100, 100), max_size=3),
    bad_words=st.none() | st.lists(st.text(min_size=1, max_size=5), max_size=3),
    structured_outputs=st.none()
    | st.builds(m.StructuredOutputsParams, choice=st.lists(st.text(min_size=1), min_size=1, max_size=3)),
    min_tokens=st.integers(0, 1),
    include_stop_str_in_output=st.booleans(),
    skip_special_tokens=st.booleans(),
    shown_special_tokens=st.none() | st.lists(st.integers(0, 2**32 - 1), max_size=3),
)
submits = st.one_of(
    *(
        st.builds(
            m.Submit,
            request_id=st.text(min_size=1, max_size=20),
            params=params,
            spread=st.none() | st.integers(1, 100) | st.sampled_from(["auto", "all"]),
            cache_salt=st.none() | st.text(min_size=1, max_size=256),
            **{field: values},
        )
        for field, values in {
            "text": texts,
            "token_ids": ids_bytes,
            "messages": st.lists(st.builds(m.ChatMessage, role=texts, content=texts), max_size=3),
        }.items()
    )
)
logprobs = st.builds(
    m.TokenLogprob,
    token_id=st.integers(0, 2**32 - 1),
    logprob=st.floats(max_value=0, allow_nan=False),
    rank=counts,
    top_ids=st.lists(counts, max_size=3),
    top_logprobs=st.lists(st.floats(max_value=0, allow_nan=False), max_size=3),
)
prompt_logprobs = st.builds(
    lambda start, count, num_top: m.PromptLogprobs(
        start=start,
        token_ids=bytes(4 * count),
        logprobs=bytes(4 * count),
        ranks=bytes(4 * count),
        num_top=num_top,
        top_ids=bytes(4 * count * num_top),
        top_logprobs=bytes(4 * count * num_top),
    ),
    st.integers(1, 2**40),
    st.integers(0, 5),
    st.integers(0, m.MAX_LOGPROBS),
)
histograms = st.lists(st.floats(allow_nan=False), unique=True, max_size=4).flatmap(
    lambda bounds: st.builds(
        m.Histogram,
        bounds=st.just(sorted(bounds)),
        counts=st.lists(counts, min_size=len(bounds) + 1, max_size=len(bounds) + 1),
        total=st.floats(allow_nan=False),
    )
)
st.register_type_strategy(m.Histogram, histograms)
st.register_type_strategy(m.PromptLogprobs, prompt_logprobs)
st.register_type_strategy(m.SamplingParams, params)
st.register_type_strategy(m.TokenLogprob, logprobs)
st.register_type_strategy(int, wire_ints)
st.register_type_strategy(float, st.floats(allow_nan=False))
st.register_type_strategy(str, texts)
st.register_type_strategy(
    m.InstanceSpec,
    st.builds(m.InstanceSpec, other_names=st.lists(texts, max_size=2), windows=st.lists(counts, max_size=3)),
)
st.register_type_strategy(
    m.CellStats,
    st.builds(m.CellStats, other_names=st.lists(texts, max_size=2), performance=st.none() | st.from_type(m.CellPerformance)),
)
st.register_type_strategy(m.JoinEpoch, st.builds(m.JoinEpoch, keep=st.lists(counts, max_size=3), calibrate=st.booleans()))
st.register_type_strategy(m.Beat, st.builds(m.Beat, samples=st.lists(st.from_type(m.StepSample), max_size=m.MAX_STEP_SAMPLES)))
st.register_type_strategy(m.Attach, st.builds(m.Attach, from_index=counts))
ranges = st.lists(st.tuples(counts, counts), max_size=2)
st.register_type_strategy(
    m.KeptShard, st.builds(m.KeptShard, below=st.lists(counts, max_size=2), since=counts, branches=ranges)
)
for kind in (m.RunOffered, m.CopyRun):
    st.register_type_strategy(kind, st.builds(kind, firsts=st.lists(counts, max_size=3)))
shards = st.lists(st.from_type(m.KeptShard), max_size=2)
st.register_type_strategy(m.Kept, st.builds(m.Kept, cached=shards, unheard=st.lists(st.from_type(m.Unheard), max_size=2)))
runs = st.lists(ranges, max_size=2)
st.register_type_strategy(m.Reserve, st.builds(m.Reserve, shared=runs))
st.register_type_strategy(m.Admit, st.builds(m.Admit, kept=st.lists(st.from_type(m.KeptPart), max_size=2)))
st.register_type_strategy(
    m.SequenceParams,
    st.builds(
        m.SequenceParams,
        logit_bias=st.dictionaries(counts, st.floats(allow_nan=False), max_size=3),
        bad_words=st.lists(st.lists(counts, min_size=1, max_size=3), max_size=3),
    ),
)


def instances(kind: Any) -> st.SearchStrategy[Any]:
    return submits if kind is m.Submit else st.from_type(kind)


@pytest.mark.parametrize(("union", "kind"), CLASSES, ids=[f"{u}-{k.__name__}" for u, k in CLASSES])
def test_round_trip(union: str, kind: Any) -> None:
    decoder: Decoder[Any] = Decoder(UNIONS[union])

    @settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
    @given(instances(kind))
    def check(message: Any) -> None:
        back = decoder.decode(encode(message))
        assert type(back) is kind
        assert back == message

    check()


def test_every_union_member_is_tried_and_known_only_in_its_own_direction() -> None:
    assert len(CLASSES) >= 35
    with pytest.raises(BadMessage, match="invalid value"):
        Decoder[Any](m.FromClient).decode(encode(m.Welcome(lease_s=1.0)))


def test_integer_keys_stay_integers() -> None:
    beat = m.Beat(epoch=1, free_blocks=2, held_tokens={7: 1, 300: 0, 2**40: 5}, counters=m.Counters())
    back = Decoder[Any](m.FromInstance).decode(encode(beat))
    assert back.held_tokens == {7: 1, 300: 0, 2**40: 5}
    assert all(type(key) is int for key in back.held_tokens)


def test_large_prompt() -> None:
    token_ids = bytes(16_000_000)
    submit = m.Submit(request_id="r", params=m.SamplingParams(), token_ids=token_ids)
    assert Decoder[Any](m.FromClient).decode(encode(submit)).token_ids == token_ids


decoder: Decoder[Any] = Decoder(m.FromClient)
submit_map = {"type": "Submit", "request_id": "r", "params": {}, "text": "hello"}


def refused(frame: bytes, using: Decoder[Any] = decoder) -> str:
    with pytest.raises(BadMessage) as caught:
        using.decode(frame)
    assert 0 < len(caught.value.reason) <= codec.MAX_REASON_CHARS
    return caught.value.reason


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    for union in UNIONS.values():
        refused(data, Decoder(union))


@settings(max_examples=300)
@given(submits, st.data())
def test_mutated_frames(message: Any, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame) - 1))
        action = data.draw(st.sampled_from(["set", "cut", "insert", "delete"]))
        if action == "set":
            frame[at] = data.draw(st.integers(0, 255))
        elif action == "insert":
            frame[at:at] = data.draw(st.binary(max_size=5))
        elif action == "delete" and len(frame) > 1:
            del frame[at]
        elif action == "cut" and at:
            del frame[at:]
    try:
        back = decoder.decode(bytes(frame))
    except BadMessage as error:
        assert len(error.reason) <= codec.MAX_REASON_CHARS
    else:
        assert isinstance(back, m.Message)


@pytest.mark.parametrize(
    "ext",
    [
        b"\xc7\x00\x05",  # an ext of no bytes
        msgpack.packb(msgpack.ExtType(5, b"abc")),
        msgpack.packb(msgpack.Timestamp(1, 2)),
        b"\x81" + b"\xa4type" + b"\xd4\x01\x00",
    ],
)
def test_ext_types(ext: bytes) -> None:
    assert "ext" in refused(ext)


@pytest.mark.parametrize("depth", [100, 1_000, 5_000, 1_000_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a"])
def test_deep_nesting(opening: bytes, depth: int) -> None:
    refused(opening * depth + b"\x01")
    refused(msgpack.packb({"type": "Ping"})[:-1] + opening * depth + b"\x01")
    refused(b"\x82\xa4type\xa4Ping\xa1x" + opening * depth + b"\x01")


def test_long_containers() -> None:
    items = codec.MAX_CONTAINER_ITEMS
    long = submit_map | {"params": {"stop_token_ids": list(range(items + 1))}}
    assert "exceeds max_array_len" in refused(msgpack.packb(long))
    assert "exceeds max_map_len" in refused(msgpack.packb({i: i for i in range(items + 1)}))
    # A header alone makes us allocate nothing.
    assert "exceeds max_array_len" in refused(b"\xdd\xff\xff\xff\xff")
    assert "exceeds max_map_len" in refused(b"\xdf\xff\xff\xff\xff")
    # Short lists in short lists: each within its limit, too many in all.
    inner = msgpack.packb([[]] * 50_000)
    assert "entries" in refused(b"\xdc" + (40).to_bytes(2, "big") + inner * 40)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"secret": 1}, "unknown field"),
        ({"params": {"secret": 1}}, r"unknown field at \$\.params"),
        ({"type": "secret"}, "invalid value"),
        ({"request_id": 5}, "Expected `str`"),
        ({"request_id": ""}, "1 to 256 characters"),
        ({"request_id": b"secret"}, "Expected `str`"),
        ({"text": None}, "exactly one"),
        ({"token_ids": b"secret!!"}, "exactly one"),
        ({"token_ids": "secret"}, "Expected `bytes"),
        ({"params": {"temperature": math.nan}}, "temperature"),
        ({"params": {"temperature": -1.0}}, "temperature"),
        ({"params": {"temperature": True}}, "Expected `float`"),
        ({"params": {"max_tokens": 1.5}}, "Expected `int | null`"),
        ({"params": {"top_p": math.nan}}, "top_p"),
        ({"params": {"stop": ["secret", 1]}}, "Expected `str`"),
        ({"spread": "secret"}, "invalid value"),
        ({"spread": 0}, "spread"),
    ],
)
def test_wrong_fields(change: dict[str, Any], reason: str) -> None:
    told = refused(msgpack.packb(submit_map | change))
    assert re.search(reason, told), told
    assert "secret" not in told


def test_other_malformed_frames() -> None:
    good = encode(m.Ping())
    assert refused(b"") == "empty frame"
    assert "1 bytes after" in refused(good + b"\x01")
    assert "middle" in refused(good[:-1])
    assert refused(b"\xc1") == "not msgpack"
    assert "UTF-8" in refused(b"\x81\xa4type\xa4\xff\xff\xff\xff")
    assert "map key" in refused(b"\x81\x80\x01")
    assert "middle" in refused(b"\x81" + b"\xa4typ")
    for not_a_map in (b"\x01", b"\x90", b"\xc0", b"\x80"):
        refused(not_a_map)


def test_frame_limit_both_ways() -> None:
    submit = m.Submit(request_id="r", params=m.SamplingParams(), text="x" * 2000)
    with pytest.raises(FrameTooLarge, match=r"Submit takes 2,\d\d\d bytes on the wire; a message may take 1,000"):
        encode(submit, max_bytes=1000)
    assert "at most 1,000" in refused(encode(submit), Decoder(m.FromClient, max_bytes=1000))


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
def test_lone_surrogates_are_refused_before_they_are_sent(text: str) -> None:
    with pytest.raises(ValueError, match="Submit can't be sent"):
        encode(m.Submit(request_id="r", params=m.SamplingParams(), text=text))


def test_integers_over_64_bits_are_refused_before_they_are_sent() -> None:
    with pytest.raises(ValueError, match="GetStats can't be sent"):
        encode(m.GetStats(call=2**64))
