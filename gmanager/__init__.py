"""The global manager and its client. Imports neither torch nor transformers.

from gmanager import AsyncClient, SamplingParams

async with AsyncClient("tcp://127.0.0.1:5570") as client:
    async for chunk in client.generate("Once upon a time", SamplingParams(max_tokens=32)):
        print(chunk.text, end="")
"""

from gmanager.client import AsyncClient, Chunk
from gmanager.wire.errors import (
    AddressError,
    BadMessage,
    CallFailed,
    DistattnError,
    FrameTooLarge,
    PeerGone,
    ProtocolRefused,
    RequestFailed,
    RequestRefused,
    ServiceUnreachable,
    TextError,
    WireError,
)
from gmanager.wire.messages import (
    CellPerformance,
    CellStats,
    ChatMessage,
    Counters,
    Histogram,
    InstanceStats,
    LanePerformance,
    Observations,
    RefusalReason,
    RequestStats,
    SamplingParams,
    Stats,
    StructuredOutputsParams,
    TextAssets,
    TokenLogprob,
)

__all__ = [
    "AddressError",
    "AsyncClient",
    "BadMessage",
    "CallFailed",
    "CellPerformance",
    "CellStats",
    "ChatMessage",
    "Chunk",
    "Counters",
    "DistattnError",
    "FrameTooLarge",
    "Histogram",
    "InstanceStats",
    "LanePerformance",
    "Observations",
    "PeerGone",
    "ProtocolRefused",
    "RefusalReason",
    "RequestFailed",
    "RequestRefused",
    "RequestStats",
    "SamplingParams",
    "ServiceUnreachable",
    "Stats",
    "StructuredOutputsParams",
    "TextAssets",
    "TextError",
    "TokenLogprob",
    "WireError",
]
