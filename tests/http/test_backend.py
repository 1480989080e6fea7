"""What a gateway makes of cells that come and go, and of what its client raises: a stand-in that does as it is told."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gmanager.gateway import backend as backend_module
from gmanager.gateway.aside import LONG_TOKENS, aside
from gmanager.gateway.backend import Backend
from gmanager.gateway.errors import ApiError, translate
from gmanager.observed import Observed
from gmanager.wire.errors import CallFailed, ProtocolRefused, RequestFailed, TextError, TextUnavailable
from gmanager.wire.messages import CellStats, Counters, Stats, TextAssets
from tests.support.tiny import make_tokenizer


def cell(name: str) -> CellStats:
    return CellStats(name=name, epoch=1, state="ready", size=1, model=name, block_size=16, max_context=512, total_tokens=1000)


def stats(*names: str) -> Stats:
    return Stats(
        epoch=1,
        cells=[cell(name) for name in names],
        instances=[],
        requests={},
        counters=Counters(),
        observed=Observed().observations(),
    )


GOOD = TextAssets(
    tokenizer_json=make_tokenizer().backend_tokenizer.to_str(), chat_template=None, special_tokens={}, eos_token_ids=[1]
)
BROKEN = TextAssets(tokenizer_json="{", chat_template=None, special_tokens={}, eos_token_ids=[1])


class Told:
    """In place of `AsyncClient`."""

    is_connected = True
    is_over = False

    def __init__(self) -> None:
        self.cells: list[str] = []
        self.assets: dict[str, TextAssets | Exception] = {}
        self.failing: Exception | None = None
        self.connected = 0
        self.asked: list[str] = []

    def __call__(self, *_: object, **__: object) -> "Told":
        return self

    async def __aenter__(self) -> "Told":
        self.connected += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def stats(self) -> Stats:
        if self.failing is not None:
            raise self.failing
        return stats(*self.cells)

    async def text_assets(self, name: str) -> TextAssets:
        self.asked.append(name)
        found = self.assets[name]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    monkeypatch.setattr(backend_module, "AsyncClient", told)
    monkeypatch.setattr(backend_module, "REFRESH_S", 0.01)
    return told


@asynccontextmanager
async def running() -> AsyncIterator[Backend]:
    backend = Backend("tcp://127.0.0.1:9")
    task = asyncio.create_task(backend.run())
    try:
        yield backend
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(is_so: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.01)


async def test_a_cell_that_has_gone_since_costs_the_others_nothing(told: Told) -> None:
    told.cells, told.assets = ["a"], {"a": GOOD, "b": CallFailed("no cell b is ready")}
    async with running() as backend:
        await until(lambda: backend.is_connected)
        client, served = backend.client(), await backend.model("a")
        told.cells = ["a", "b"]
        await until(lambda: told.asked.count("b") > 2)
        assert (backend.client(), await backend.model("a")) == (client, served)
        assert told.connected == 1
        with pytest.raises(ApiError, match="no model 'b' is served; there is a"):
            await backend.model("b")


async def test_a_tokenizer_that_cannot_be_read_is_fetched_once(told: Told) -> None:
    told.cells, told.assets = ["a", "b"], {"a": GOOD, "b": BROKEN}
    async with running() as backend:
        await until(lambda: backend.is_connected)
        await backend.model("a")
        for _ in range(3):
            with pytest.raises(ApiError, match="no model 'b' is served"):
                await backend.model("b")
        assert told.asked == ["a", "b"]


@pytest.mark.parametrize("error", [ProtocolRefused("the first message must be Hello"), ZeroDivisionError()], ids=repr)
async def test_it_connects_again_whatever_was_raised(told: Told, error: Exception) -> None:
    told.cells, told.assets = ["a"], {"a": GOOD}
    async with running() as backend:
        await until(lambda: backend.is_connected)
        told.failing = error
        await until(lambda: told.connected > 1)
        told.failing = None
        await until(lambda: backend.is_connected)
        assert (await backend.model("a")).name == "a"


@pytest.mark.parametrize("error", [ProtocolRefused("late"), CallFailed("no")], ids=repr)
async def test_a_scrape_that_fails_is_unavailable(told: Told, error: Exception) -> None:
    backend = Backend("tcp://127.0.0.1:9")
    backend._client = told  # type: ignore[assignment]
    told.failing = error
    with pytest.raises(ApiError) as raised:
        await backend.stats()
    assert (raised.value.status_code, raised.value.code) == (503, "not_ready")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (TextError("no chat template"), 400, None),
        (TextUnavailable("the service is ending"), 503, "service_failed"),
        (RequestFailed("instance 1 died"), 503, "service_failed"),
    ],
    ids=repr,
)
def test_whose_fault_it_was(error: Any, status: int, code: str | None) -> None:
    answer = translate(error)
    assert (answer.status_code, answer.code) == (status, code)


async def test_work_of_many_tokens_leaves_the_loop_to_others() -> None:
    has_turned = threading.Event()

    def work() -> bool:
        return has_turned.wait(10)

    working = asyncio.create_task(aside(LONG_TOKENS, work))
    await asyncio.sleep(0.05)
    has_turned.set()  # never reached, were it called in the loop
    assert await working
    assert await aside(LONG_TOKENS - 1, threading.get_ident) == threading.get_ident()
