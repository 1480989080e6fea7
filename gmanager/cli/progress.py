"""What a start waits for, and how long it takes."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext

from rich.console import Console
from rich.status import Status
from rich.text import Text

from gmanager.cli.service import Service, ServiceConfig, running


class _Stage:
    """The thing that is waited for, and its seconds whenever it is drawn."""

    def __init__(self) -> None:
        self._name = ""
        self._began = time.monotonic()

    def enter(self, name: str) -> bool:
        """Whether it is a new one."""
        is_new = name != self._name
        if is_new:
            self._name, self._began = name, time.monotonic()
        return is_new

    def __rich__(self) -> Text:
        return Text.assemble(self._name, (f" {time.monotonic() - self._began:.0f} s", "dim"))


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Tells what is being waited for: in one live line on a terminal, else in a line for each new thing, with when it began."""
    began = time.monotonic()
    stage = _Stage()

    def tell(name: str) -> None:
        if stage.enter(name) and not console.is_terminal:
            console.print(f"{time.monotonic() - began:4.0f} s  {name}", markup=False, soft_wrap=True)

    with Status(stage, console=console) if console.is_terminal else nullcontext():
        yield tell


@asynccontextmanager
async def shown_running(config: ServiceConfig, console: Console) -> AsyncIterator[Service]:
    """As `running`, and its start is shown. Raises ServiceError."""
    async with AsyncExitStack() as stack:
        with progress(console) as tell:
            service = await stack.enter_async_context(running(config, tell))
        yield service
