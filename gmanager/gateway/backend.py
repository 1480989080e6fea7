"""The gateway's connection to the service: one client, made anew when it is lost, and what is known of the served models."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from gmanager.client import AsyncClient
from gmanager.gateway.errors import ApiError
from gmanager.gateway.habits import Habits, habits_of
from gmanager.gateway.reply import TAGS
from gmanager.text.tokenizer import Tokenizer
from gmanager.wire.channel import Transport
from gmanager.wire.errors import CallFailed, DistattnError, ServiceUnreachable, TextError
from gmanager.wire.logs import get_logger
from gmanager.wire.messages import Stats

log = get_logger("gateway")

REFRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class Served:
    """A model that a ready cell serves."""

    name: str
    cell: str
    epoch: int
    max_context: int
    rotary: str
    """What was chosen of its rotary frequencies; empty: nothing."""
    kv_dtype: str
    """How its KV is stored; empty: in the model's dtype."""
    tokenizer: Tokenizer
    since: int
    """Unix time."""
    habits: Habits
    shown_special: list[int]
    """Special tokens that must be seen in the text, to read calls and thoughts."""
    root: str
    """What the service calls it, if `name` is an alias."""


class Backend:
    """`run` until cancelled; meanwhile `client` and `model` give what requests need, or raise ApiError."""

    def __init__(self, address: str, *, transport: Transport | None = None, aliases: Mapping[str, str] | None = None) -> None:
        """`aliases`: other names of models, and what the service calls them. A model that has such a name goes first."""
        self._address = address
        self._given_aliases = dict(aliases or {})
        self._aliases = self._given_aliases
        """With the other names that the cells have."""
        self._transport = transport
        self._client: AsyncClient | None = None
        self._models: dict[str, Served] = {}
        self._unusable: set[tuple[str, int]] = set()
        """Cells, by name and epoch, whose tokenizer can't be read."""
        self._refreshing = asyncio.Lock()

    async def run(self) -> None:
        """Keep a connection, and look every second who serves what."""
        try:
            while True:
                try:
                    async with AsyncClient(self._address, transport=self._transport) as client:
                        self._client = client
                        log.info("connected", gmanager=self._address)
                        await self._look_after(client)
                except DistattnError as error:
                    log.warning("gManager lost", reason=str(error))
                except Exception:  # a gateway that looks no more would answer 503 for ever
                    log.exception("connection given up")
                finally:
                    self._client = None
                await self._forget(self._models)
                await asyncio.sleep(REFRESH_S)
        finally:
            await self._forget(self._models)

    async def _look_after(self, client: AsyncClient) -> None:
        """Until the client is over. While it has no connection its streams wait for the next one. Raises DistattnError."""
        was_connected = True
        while True:
            try:
                await self._refresh(client)
            except ServiceUnreachable as error:
                if client.is_over:
                    raise
                if was_connected:
                    log.warning("connection lost", reason=str(error))
            was_connected = client.is_connected
            await asyncio.sleep(REFRESH_S)

    @property
    def is_connected(self) -> bool:
        return self._client is not None and self._client.is_connected

    def client(self) -> AsyncClient:
        """Raises ApiError 503 if there is no connection."""
        if self._client is None or not self._client.is_connected:
            raise ApiError(503, f"the gManager at {self._address} does not answer", code="not_ready")
        return self._client

    async def stats(self) -> Stats:
        """Raises ApiError 503."""
        client = self.client()
        try:
            return await client.stats()
        except DistattnError as error:
            raise ApiError(503, str(error), code="not_ready") from error

    async def models(self) -> list[Served]:
        """By name, and by other names. Raises ApiError 503 if there is no connection, or no cell is ready."""
        if not self._models:
            await self._refresh_now()
        if not self._models:
            raise ApiError(503, "no instances are ready to serve", code="not_ready")
        others = {
            alias: replace(self._models[name], name=alias)
            for alias, name in self._aliases.items()
            if name in self._models and alias not in self._models
        }
        known = self._models | others
        return [known[name] for name in sorted(known)]

    async def model(self, name: str | None) -> Served:
        """The model of that name, or the only one. Raises ApiError 404 or 503."""
        if name is not None and self._aliases.get(name, name) not in self._models and name not in self._models:
            await self._refresh_now()
        served = await self.models()
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        for model in served:
            if model.name == name:
                return model
        there_is = ", ".join(model.name for model in served)
        if name is None:
            raise ApiError(400, f"say which model is meant; there is {there_is}", param="model")
        raise ApiError(404, f"no model {name[:100]!r} is served; there is {there_is}", param="model", code="model_not_found")

    async def _refresh_now(self) -> None:
        try:
            await self._refresh(self.client())
        except DistattnError as error:
            raise ApiError(503, str(error), code="not_ready") from error

    async def _refresh(self, client: AsyncClient) -> None:
        """Learn of cells that have become ready, or are gone."""
        async with self._refreshing:
            ready = {cell.model: cell for cell in (await client.stats()).cells if cell.state != "forming"}
            await self._forget(name for name, model in self._models.items() if name not in ready)
            told = {other: name for name, cell in ready.items() for other in cell.other_names}
            self._aliases = told | self._given_aliases
            self._unusable &= {(cell.name, cell.epoch) for cell in ready.values()}
            for name, cell in ready.items():
                known = self._models.get(name)
                if (cell.name, cell.epoch) in self._unusable or (
                    known is not None and (known.cell, known.epoch) == (cell.name, cell.epoch)
                ):
                    continue
                try:
                    assets = await client.text_assets(cell.name)
                    if known is not None and known.tokenizer.assets == assets:  # its membership has changed, no more
                        self._models[name] = replace(
                            known,
                            cell=cell.name,
                            epoch=cell.epoch,
                            max_context=cell.max_context,
                            rotary=cell.rotary,
                            kv_dtype=cell.kv_dtype,
                        )
                        continue
                    tokenizer = await asyncio.to_thread(Tokenizer, assets)
                except CallFailed as error:  # it has gone since: the other cells' requests are none the worse
                    log.warning("cell not ready any more", model=name, reason=str(error))
                    continue
                except TextError as error:
                    log.error("tokenizer unusable", model=name, reason=str(error))
                    self._unusable.add((cell.name, cell.epoch))
                    continue
                await self._forget([name])
                self._models[name] = Served(
                    name=name,
                    cell=cell.name,
                    epoch=cell.epoch,
                    max_context=cell.max_context,
                    rotary=cell.rotary,
                    kv_dtype=cell.kv_dtype,
                    tokenizer=tokenizer,
                    since=int(time.time()),
                    habits=habits_of(assets.chat_template),
                    shown_special=tokenizer.special_ids(TAGS),
                    root=name,
                )

    async def _forget(self, names: Iterable[str]) -> None:
        for name in list(names):
            model = self._models.pop(name, None)
            if model is not None:
                await model.tokenizer.close()
