"""Each policy with real processes, on loopback only: the answers are those of a single transformers run, wherever KV lies."""

from pathlib import Path
from typing import get_args

import pytest

from gmanager import RequestRefused
from gmanager.config import GManagerConfig, PolicyName
from tests.support.processes import Processes, client_of, until_ready
from tests.support.service import at_rest
from tests.support.tiny import make_long_model
from tests.test_lifecycle import flags, here, until
from tests.test_membership import Stream, text

NEW = 60
POOL = 480
"""Tokens of KV of each instance: the longest of the prompts fits into no one of them."""
LENGTHS = (40, 200, 300, 420, 700)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that takes long texts."""
    return make_long_model(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("policy", get_args(PolicyName))
async def test_no_policy_changes_an_answer(started: Processes, model: Path, policy: str) -> None:
    """Prompts of all lengths at once, more than memory holds: some wait, some are preempted, some move."""
    lengths = [length for length in LENGTHS if policy != "static" or length + NEW < POOL]
    texts = [text(model, length, NEW, length) for length in lengths]
    roles = ["prefill", "decode", "mixed"] if policy == "split" else ["mixed"] * 3
    async with here(GManagerConfig(bind="tcp://127.0.0.1:*", policy=policy)) as server:
        for rank, role in enumerate(roles):
            chosen = flags(server.address, model, "--kv-tokens", str(POOL), "--role", role)
            started.instance(*chosen, rank=rank, world_size=3)
        await until_ready(server.address)
        async with client_of(server.address) as client:
            streams = [Stream(client, f"s{i}", ids, NEW, "auto") for i, (ids, _) in enumerate(texts)]
            for stream, (_, expected) in zip(streams, texts, strict=True):
                await stream.is_right(expected)
            if policy == "static":
                stats = await client.stats()
                assert all(len(request.kv_tokens) == 1 for request in stats.requests.values())
                too_long = client.generate([5] * (POOL + 1), request_id="too long")
                with pytest.raises(RequestRefused, match="the policy keeps a request inside one instance"):
                    await anext(too_long)
            await at_rest(client)


async def test_split_decodes_where_it_does_not_compute(started: Processes, model: Path) -> None:
    """Of two roles: the first token comes from one, the others from the other, to which the KV follows."""
    ids, expected = text(model, 600, 200)
    async with here(GManagerConfig(bind="tcp://127.0.0.1:*", policy="split")) as server:
        for rank, role in enumerate(("decode", "prefill")):
            started.instance(*flags(server.address, model, "--role", role), rank=rank, world_size=2)
        await until_ready(server.address)
        async with client_of(server.address) as client:
            stream = Stream(client, "s", ids, 200, "auto")
            await stream.reach(1)
            moved = await until(client, lambda s: s.requests["s"].home == 0 or s.requests["s"].finish_reason is not None)
            assert moved.requests["s"].home == 0, "it never went where rows are decoded"
            assert moved.requests["s"].finish_reason is None, "it went there only when all was over"
            until_moved = moved.requests["s"].generated_tokens + 1  # the last travels with the home
            followed = await until(client, lambda s: s.counters.blocks_copied >= 600 // 16)
            assert followed.requests["s"].finish_reason is None, "its KV followed only when all was over"
            await stream.is_right(expected)
            stats = await until(client, lambda s: sum(i.counters.tokens_generated for i in s.instances) == 200)
            by_instance = {i.rank: (i.counters.tokens_prefilled, i.counters.tokens_generated) for i in stats.instances}
            assert by_instance[0][0] == 0, "a prompt ran where rows are decoded"
            assert by_instance[1][1] <= until_moved, "rows were decoded where prompts run"
            await at_rest(client)


async def test_a_missing_role_is_told_and_all_serve(started: Processes, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids, expected = text(model, 100, 20)
    async with here(GManagerConfig(bind="tcp://127.0.0.1:*", policy="split")) as server:
        for rank in range(2):
            started.instance(*flags(server.address, model, "--role", "decode"), rank=rank, world_size=2)
        await until_ready(server.address)
        async with client_of(server.address) as client:
            await Stream(client, "s", ids, 20, "auto").is_right(expected)
        assert "roles mean nothing" in caplog.text


async def test_a_role_that_does_not_exist_is_refused(started: Processes, model: Path) -> None:
    instance = started.instance(*flags("tcp://127.0.0.1:1", model, "--role", "decoder"), rank=0, world_size=1)
    assert await instance.exit_code() == 2
    assert "--role must be one of mixed, prefill, decode, got decoder" in instance.text
