"""The states of a request, and every way from one to the next.

waiting ──> encoding ──> queued <──> reserving ──> prefill ──> decode <──> moving       every state ──> finished
   └────────────────────>  ^ ^                        └────────┴─────────────┤
                           │ └───────── interrupted ──────────┴─────────────┤    (keeps its age, and what is left of its KV)
                           └────────────────────────────────────────── preempted        (keeps its age: first in the queue)
"""

from dataclasses import dataclass
from typing import Literal

State = Literal["waiting", "encoding", "queued", "reserving", "prefill", "decode", "moving", "preempted", "finished"]

Change = Literal[
    "encode",
    "enqueue",
    "reserve",
    "deny",
    "admit",
    "generate",
    "move",
    "rest",
    "rest early",
    "preempt",
    "release",
    "interrupt",
    "end",
]

WAITING: tuple[State, ...] = ("waiting", "encoding", "queued", "reserving")
"""It waits for a ready cell, for its tokens, for memory, for the instances' grants; what is left of its KV grows no more."""

RUNNING: tuple[State, ...] = ("prefill", "decode", "moving", "preempted")
"""It is a sequence of its cell: `preempted` is one that is being released."""


@dataclass(frozen=True, slots=True)
class Transition:
    """What a change does to a request's state."""

    sources: tuple[State, ...]
    target: State
    meaning: str


TRANSITIONS: dict[Change, Transition] = {
    "encode": Transition(("waiting",), "encoding", "its cell is ready; the shell makes tokens of its text"),
    "enqueue": Transition(("waiting", "encoding"), "queued", "cell and tokens are known: it waits for memory"),
    "reserve": Transition(("queued",), "reserving", "it was placed; each instance is asked for its blocks"),
    "deny": Transition(("reserving",), "queued", "an instance has no room after all"),
    "admit": Transition(("reserving",), "prefill", "all have granted: its sequence begins"),
    "generate": Transition(("prefill",), "decode", "its first token of this sequence has come"),
    "move": Transition(("prefill", "decode"), "moving", "a block is asked of its next home"),
    "rest": Transition(("moving",), "decode", "it has moved, or the move was given up"),
    "rest early": Transition(("moving",), "prefill", "the same before its first token"),
    "preempt": Transition(("prefill", "decode", "moving"), "preempted", "an older one needs its blocks"),
    "release": Transition(("preempted",), "queued", "its blocks are free; it waits to be computed anew"),
    "interrupt": Transition(
        ("reserving", *RUNNING),
        "queued",
        "its cell's membership changes; it goes on in the next epoch with what is left of its KV",
    ),
    "end": Transition((*WAITING, *RUNNING), "finished", "its one final answer was given"),
}
"""All there is: `Requests.change` alone makes them."""
