"""Work that would hold up all other requests: it is done beside the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

LONG_TOKENS = 1024
"""So many with 20 log-probabilities each take 15 ms; a million 15 s, in which a gateway would lose its connection."""

# one thread: several would only take the interpreter lock from the loop more often
_thread = ThreadPoolExecutor(1, thread_name_prefix="long-answers")


async def aside(num_tokens: int, work: Callable[[], T]) -> T:
    """What `work` gives: called at once, or in the thread if it is about many tokens."""
    if num_tokens < LONG_TOKENS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_thread, work)
