"""The real `openai` package against the gateway: nothing but `base_url` and `api_key` is changed."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from gmanager import AsyncClient, SamplingParams
from gmanager.config import GManagerConfig
from gmanager.gateway import aside
from gmanager.server import Server
from gmanager.wire.scaling import RopeScaling
from tests.support.exactness import LOGPROB_TOLERANCE, prompt
from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import Service, at_rest, ready, serve
from tests.support.tiny import make_model, make_tokenizer, prompt_reference, reference

KEY = "sk-a-key"
TURNS: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
async def service(farm: Farm, llama: Path) -> AsyncIterator[Service]:
    async with serve(farm, 2, Setup(model=llama, chunk_tokens=64)) as service:
        yield service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[AsyncOpenAI]:
    async with (
        gateway(service.server.address, api_keys=("another", KEY), max_n=4, max_prompts=4) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield client


async def tokens_of(client: AsyncClient, ids: list[int], params: SamplingParams) -> tuple[list[int], str]:
    """What the service itself answers."""
    chunks = [chunk async for chunk in client.generate(ids, params)]
    return [token for chunk in chunks for token in chunk.token_ids], "".join(chunk.text for chunk in chunks)


def text_ids(text: str) -> list[int]:
    ids: list[int] = make_tokenizer()(text).input_ids
    return ids


async def test_models(client: AsyncOpenAI, llama: Path) -> None:
    (model,) = (await client.models.list()).data
    assert (model.id, model.object, model.owned_by) == (str(llama), "model", "distattn")
    assert (await client.models.retrieve(model.id)).id == model.id
    assert model.model_extra["rope_scaling"] is None  # type: ignore[index]


async def test_what_was_chosen_of_rotary_frequencies_is_told(farm: Farm, tmp_path: Path) -> None:
    setup = Setup(model=make_model("qwen2", tmp_path), rope_scaling=RopeScaling("dynamic", 4))
    async with (
        serve(farm, 1, setup) as service,
        gateway(service.server.address) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        (model,) = (await client.models.list()).data
    told = {name: model.model_extra[name] for name in ("max_model_len", "rope_scaling")}  # type: ignore[index]
    assert told == {"max_model_len": 2048, "rope_scaling": "dynamic:4 with the frequencies of texts of 2,048 tokens"}


async def test_a_completion_is_what_the_service_answers(client: AsyncOpenAI, service: Service, llama: Path) -> None:
    params = SamplingParams(max_tokens=9, temperature=0)
    _, text = await tokens_of(service.client, text_ids("hello"), params)
    for given in ("hello", text_ids("hello")):
        answer = await client.completions.create(model=str(llama), prompt=given, max_tokens=9, temperature=0)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (text, "length", 0, None)
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 9, 14)
        assert (answer.object, answer.model) == ("text_completion", str(llama))


async def test_what_was_cached_is_told_and_a_salt_sets_apart(client: AsyncOpenAI, llama: Path) -> None:
    ids = [(i * i * 7 + 3) % 256 for i in range(100)]
    asked: Any = {"model": str(llama), "prompt": ids, "max_tokens": 3, "temperature": 0}
    texts = []
    for salt, cached in ((None, 0), (None, 96), ("mine", 0), ("yours", 0), ("mine", 96)):
        answer = await client.completions.create(**asked, extra_body={} if salt is None else {"cache_salt": salt})
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens == 100
        assert answer.usage.prompt_tokens_details.cached_tokens == cached
        texts.append(answer.choices[0].text)
    assert len(set(texts)) == 1
    twice = await client.completions.create(**asked | {"prompt": [ids, ids]}, n=2)
    assert twice.usage is not None and twice.usage.prompt_tokens_details is not None
    assert twice.usage.prompt_tokens_details.cached_tokens == 192, "each prompt counts once"
    for wrong in ("", "x" * 257, 7):
        with pytest.raises(openai.BadRequestError, match="cache_salt"):
            await client.completions.create(**asked, extra_body={"cache_salt": wrong})


async def test_streams_hold_what_whole_answers_do(client: AsyncOpenAI, llama: Path) -> None:
    asked: Any = {"model": str(llama), "max_tokens": 12, "temperature": 0.9, "seed": 5, "n": 2}
    whole = await client.completions.create(prompt="hello", logprobs=2, **asked)
    texts, reasons, logprobs = ["", ""], ["", ""], [[], []]  # type: ignore[var-annotated]
    usage = None
    stream = await client.completions.create(
        prompt="hello", logprobs=2, stream=True, stream_options={"include_usage": True}, **asked
    )
    async for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] += choice.finish_reason or ""
            assert choice.logprobs is not None
            logprobs[choice.index] += choice.logprobs.token_logprobs or []
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0] != texts[1], "each of n has a seed of its own"
    assert reasons == ["length", "length"]
    assert logprobs == [choice.logprobs.token_logprobs for choice in whole.choices if choice.logprobs]
    assert usage == whole.usage

    chat = await client.chat.completions.create(messages=TURNS, **asked)
    contents, roles = ["", ""], [set(), set()]  # type: ignore[var-annotated]
    async for chat_chunk in await client.chat.completions.create(messages=TURNS, stream=True, **asked):
        for part in chat_chunk.choices:
            contents[part.index] += part.delta.content or ""
            roles[part.index] |= {part.delta.role} - {None}
    assert contents == [choice.message.content for choice in chat.choices]
    assert roles == [{"assistant"}, {"assistant"}]


async def test_chat_puts_the_conversation_into_the_template(client: AsyncOpenAI, service: Service, llama: Path) -> None:
    ids = text_ids("<system>Be brief.\n<user>hello\n<assistant>")
    _, text = await tokens_of(service.client, ids, SamplingParams(max_tokens=7, temperature=0))
    parts: Any = [TURNS[0], {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    for most in ({"max_tokens": 7}, {"max_completion_tokens": 7}):
        for turns in (TURNS, parts):
            limits: Any = most
            answer = await client.chat.completions.create(model=str(llama), messages=turns, temperature=0, **limits)
            (choice,) = answer.choices
            assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "length")
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(ids)


async def test_an_answer_without_a_limit_fills_the_context(client: AsyncOpenAI, llama: Path) -> None:
    (model,) = (await client.models.list()).data
    room = model.model_extra["max_model_len"]  # type: ignore[index]
    answer = await client.chat.completions.create(
        model=str(llama), messages=TURNS, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == room
    assert answer.choices[0].finish_reason == "length"


async def test_logprobs(client: AsyncOpenAI, llama: Path) -> None:
    ids = prompt(llama, 20, new=5)
    want = reference(llama, tuple(ids), 5)
    completion = await client.completions.create(model=str(llama), prompt=ids, max_tokens=5, temperature=0, logprobs=3)
    table = completion.choices[0].logprobs
    assert table is not None
    assert table.token_logprobs == pytest.approx(want.logprobs, abs=LOGPROB_TOLERANCE)
    assert table.top_logprobs is not None
    assert [max(tops.values()) for tops in table.top_logprobs] == pytest.approx(want.logprobs, abs=LOGPROB_TOLERANCE)
    assert all(len(tops) == 3 for tops in table.top_logprobs)
    assert len(table.tokens or []) == len(table.text_offset or []) == 5
    chat = await client.chat.completions.create(
        model=str(llama), messages=TURNS, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content if chat.choices[0].logprobs else None
    assert content is not None
    assert len(content) == 3
    for entry in content:
        assert [entry.token, entry.logprob, entry.bytes] == [
            entry.top_logprobs[0].token, entry.top_logprobs[0].logprob, entry.top_logprobs[0].bytes,
        ]  # fmt: skip
        assert len(entry.top_logprobs) == 2
    text = b"".join(bytes(entry.bytes or []) for entry in content).decode(errors="replace")
    assert text == chat.choices[0].message.content


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo_scores_the_prompt(
    stream: bool, max_tokens: int, is_long: bool, client: AsyncOpenAI, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_long:
        monkeypatch.setattr(aside, "LONG_TOKENS", 1)
    text = "The quick brown f\u00f6x jumps over the \U0001f634 dog. " * 4
    ids = text_ids(text)
    rows = prompt_reference(llama, ids)
    asked: Any = {"model": str(llama), "prompt": text, "max_tokens": max_tokens, "temperature": 0, "logprobs": 2, "echo": True}
    if stream:
        chunks = [chunk async for chunk in await client.completions.create(stream=True, **asked)]
        choices = [chunk.choices[0] for chunk in chunks]
    else:
        choices = (await client.completions.create(**asked)).choices
    given = "".join(choice.text for choice in choices)
    assert given.startswith(text)
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens or []]
    logprobs = [value for choice in choices if choice.logprobs for value in choice.logprobs.token_logprobs or []]
    offsets = [value for choice in choices if choice.logprobs for value in choice.logprobs.text_offset or []]
    tops = [value for choice in choices if choice.logprobs for value in choice.logprobs.top_logprobs or []]
    assert len(tokens) == len(logprobs) == len(offsets) == len(tops) == len(ids) + max_tokens
    data = text.encode()  # a token is a byte here
    assert tokens[: len(ids)] == [chr(byte) if byte < 0x80 else f"bytes:\\x{byte:02x}" for byte in data]
    assert offsets[: len(ids)] == [len(data[:i].decode(errors="ignore")) for i in range(len(ids))]
    want = [float(row[token]) for row, token in zip(rows, ids[1:], strict=True)]
    assert logprobs[0] is None
    assert logprobs[1 : len(ids)] == pytest.approx(want, abs=LOGPROB_TOLERANCE)
    best = [float(row.max()) for row in rows]
    assert [max(top.values()) for top in tops[1 : len(ids)]] == pytest.approx(best, abs=LOGPROB_TOLERANCE)
    assert choices[-1].finish_reason == "length"


async def test_batches_of_prompts(client: AsyncOpenAI, llama: Path) -> None:
    asked: Any = {"model": str(llama), "max_tokens": 6, "temperature": 0}
    alone = [(await client.completions.create(prompt=text, **asked)).choices[0].text for text in ("one", "three")]
    for batch in (["one", "three"], [text_ids("one"), text_ids("three")]):
        together = await client.completions.create(prompt=batch, n=2, **asked)
        assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in together.choices] == [alone[0], alone[0], alone[1], alone[1]]
        assert together.usage is not None
        assert (together.usage.prompt_tokens, together.usage.completion_tokens) == (8, 24)


async def test_stop_strings_and_tokens(client: AsyncOpenAI, service: Service, llama: Path) -> None:
    ids = text_ids("hello")
    tokens, text = await tokens_of(service.client, ids, SamplingParams(max_tokens=20, temperature=0.9, seed=3))
    asked: Any = {"model": str(llama), "prompt": "hello", "max_tokens": 20, "temperature": 0.9, "seed": 3}
    stop = text[6:8]
    answer = await client.completions.create(stop=[stop, "never there"], **asked)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    answer = await client.completions.create(extra_body={"stop_token_ids": [tokens[4]]}, **asked)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == tokens.index(tokens[4]) + 1


async def test_closing_a_stream_aborts_its_request(client: AsyncOpenAI, service: Service, llama: Path) -> None:
    for stream_of in ("chat", "completions"):
        asked: Any = {
            "model": str(llama),
            "max_tokens": 400,
            "temperature": 0,
            "stream": True,
            "extra_body": {"ignore_eos": True},
        }
        if stream_of == "chat":
            stream: Any = await client.chat.completions.create(messages=TURNS, **asked)
        else:
            stream = await client.completions.create(prompt="hello", **asked)
        async for _ in stream:
            break
        await stream.close()
        await at_rest(service.client)
    reasons = [r.finish_reason for r in (await service.client.stats()).requests.values()]
    assert reasons == ["abort", "abort"]


async def test_a_client_that_leaves_aborts_a_whole_answer(client: AsyncOpenAI, service: Service, llama: Path) -> None:
    asked: Any = {"model": str(llama), "max_tokens": 400, "temperature": 0, "n": 2, "extra_body": {"ignore_eos": True}}
    asking = asyncio.create_task(client.completions.create(prompt="hello", **asked))
    async with asyncio.timeout(5):
        while sum(r.state == "decode" for r in (await service.client.stats()).requests.values()) < 2:
            await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await at_rest(service.client)
    assert [r.finish_reason for r in (await service.client.stats()).requests.values()] == ["abort", "abort"]


WRONG: list[tuple[dict[str, Any], type[openai.APIStatusError], str]] = [
    (
        {"prompt": "x" * 600},
        openai.BadRequestError,
        "prompt of 600 \\+ max_tokens of 16 = 616 tokens; the model takes at most 512",
    ),
    ({"prompt": []}, openai.BadRequestError, "the prompt is empty"),
    ({"prompt": [300]}, openai.BadRequestError, "token id 300 at position 0 is out of range: the model has 300 tokens"),
    ({"prompt": ["a"] * 5}, openai.BadRequestError, "5 prompts; a request has at most 4"),
    ({"n": 5}, openai.BadRequestError, "n must be at most 4, got 5"),
    ({"max_tokens": 0}, openai.BadRequestError, r"max_tokens: must be at least 1, got 0 \(0 is for echo\)"),
    ({"temperature": -1}, openai.BadRequestError, "temperature: Input should be greater than or equal to 0"),
    ({"logprobs": 21}, openai.BadRequestError, "logprobs: Input should be less than or equal to 20"),
    ({"stop": ["a", ""]}, openai.BadRequestError, "a stop string must not be empty"),
    ({"presence_penalty": 2.5}, openai.BadRequestError, "presence_penalty: Input should be less than or equal to 2, got 2.5"),
    ({"suffix": "end"}, openai.BadRequestError, 'suffix: not implemented, leave it out; got "end"'),
    ({"model": "gpt-5"}, openai.NotFoundError, "no model 'gpt-5' is served; there is "),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "kind", "message"), WRONG, ids=[str(case[0])[:40] for case in WRONG])
async def test_errors(
    fields: dict[str, Any], kind: type[openai.APIStatusError], message: str, stream: bool, client: AsyncOpenAI, llama: Path
) -> None:
    with pytest.raises(kind, match=message) as raised:
        await client.completions.create(**{"model": str(llama), "prompt": "hello", "stream": stream} | fields)
    body: Any = raised.value.body
    assert set(body) == {"message", "type", "param", "code"}


async def test_what_can_never_be_served(farm: Farm, llama: Path) -> None:
    async with (
        serve(farm, 2, Setup(model=llama, kv_tokens=64)) as small,
        gateway(small.server.address) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.UnprocessableEntityError, match="needs 216 tokens of KV; cell 'main' holds 128"):
            await client.completions.create(model=str(llama), prompt="x" * 200)


async def test_too_many_at_once(service: Service, llama: Path) -> None:
    async with (
        gateway(service.server.address, max_concurrency=1) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked: Any = {"model": str(llama), "prompt": "hello", "max_tokens": 300, "extra_body": {"ignore_eos": True}}
        stream = await client.completions.create(stream=True, **asked)
        with pytest.raises(openai.RateLimitError, match="1 requests are under way"):
            await client.completions.create(**asked)
        await stream.close()
        # the package waits as Retry-After says, and asks again
        await at_rest(service.client)
        assert await client.with_options(max_retries=3).completions.create(**asked | {"max_tokens": 2})


async def test_a_service_that_fails_while_it_answers(farm: Farm, llama: Path) -> None:
    """A stream ends with the error; what is asked then is refused; and nothing hangs."""
    stopping = Server(GManagerConfig(bind="tcp://127.0.0.1:*"))
    stopping.start()
    running = asyncio.create_task(stopping.run())
    try:
        async with (
            farm.serve(1, Setup(model=llama), stopping.address, rests=False),
            gateway(stopping.address) as url,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            AsyncClient(stopping.address) as direct,
        ):
            await ready(direct)
            asked: Any = {"model": str(llama), "prompt": "hello", "max_tokens": 400, "extra_body": {"ignore_eos": True}}
            texts = []
            with pytest.raises(openai.APIError, match="gManager is shutting down"):
                async for chunk in await client.completions.create(stream=True, **asked):
                    texts.append(chunk.choices[0].text)
                    stopping.stop()
            assert texts
            with pytest.raises(openai.InternalServerError):
                await client.completions.create(**asked)
    finally:
        stopping.stop()
        await running


async def test_keys(client: AsyncOpenAI, llama: Path) -> None:
    for key in ("wrong", KEY + "x", KEY[:-1]):
        stranger = client.with_options(api_key=key)
        with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
            await stranger.models.list()
        with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
            await stranger.completions.create(model=str(llama), prompt="hello")
    assert (await client.with_options(api_key="another").models.list()).data
