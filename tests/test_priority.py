"""Who goes first, with real instances: a pool that holds one request at a time."""

import asyncio
from pathlib import Path

from gmanager import SamplingParams
from tests.support.farm import Farm, Setup
from tests.support.service import serve
from tests.support.tiny import make_model


async def test_the_queue_is_by_priority(farm: Farm, tmp_path: Path) -> None:
    """All are submitted at once, as token ids: the first finds memory, whatever its priority, and the others go by theirs."""
    order: list[str] = []
    async with serve(farm, 1, Setup(model=make_model("llama", tmp_path), kv_tokens=128)) as service:

        async def ask(name: str, priority: int) -> None:
            params = SamplingParams(max_tokens=20, ignore_eos=True)
            chunks = service.client.generate([40] * 70, params, request_id=name, priority=priority)
            await anext(chunks)
            order.append(name)
            async for _ in chunks:
                pass

        asks = [("first", 5), ("low", 1), ("usual", 0), ("high", -1), ("high too", -1)]
        await asyncio.gather(*(ask(*each) for each in asks))
    assert order == ["first", "high", "high too", "usual", "low"]
