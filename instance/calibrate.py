"""Some steps before the first real one, so that the gManager knows how long such steps take here.

They run on the path of real ones (captured graphs where there are any), read whatever lies in the pool, and write nothing.
Small ones first: a large one isn't tried on a device that is too slow for it.
"""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from distattn.layout import Layout, read_run
from gmanager.wire.messages import SequenceParams
from instance.plan import SampledRow, StepPlan
from instance.step import LANES, Lane
from kvstore.run import Run
from kvstore.sight import FULL, Sight

BUDGET_S = 0.4
"""For the steps of one lane."""
GROWTH = 4
"""No step takes many more times as long as the one before."""
LONG_TOKENS = 2048
"""Of KV, beside which a row's own cost is small or at least another."""
DECODE_ROWS = (1, 4, 16, 64)
CHUNK_PARTS = (64, 16, 4, 1)

_GREEDY = SequenceParams(max_tokens=1, temperature=0, top_k=0, top_p=1, seed=0, stop_token_ids=[], logprobs=None)


@dataclass(frozen=True, slots=True)
class Room:
    """What made-up steps may use."""

    num_blocks: int
    block_size: int
    max_context: int
    chunk_tokens: int
    sights: tuple[Sight, ...] = (FULL,)
    """Of the model's groups of layers."""

    def most_tokens(self, sequences: int = 1) -> int:
        """Of the KV of each of so many sequences."""
        return min(self.num_blocks // sequences * self.block_size, self.max_context)


async def calibrate(
    room: Room, run: Callable[[Lane, StepPlan], Awaitable[int]], note: Callable[[Lane, Layout, int], None]
) -> None:
    """`run` a step by itself, and have its time: nanoseconds. `note` each that is to be told of.

    Each step runs twice, and the second time counts: in the first one some kernels are chosen and some memory is allocated.
    """
    for lane in LANES:
        spent_ns = last_ns = 0
        for plan in plans(lane, room):
            if spent_ns + 2 * GROWTH * last_ns > BUDGET_S * 1e9:
                break
            spent_ns += await run(lane, plan)
            last_ns = await run(lane, plan)
            spent_ns += last_ns
            note(lane, plan.layout, last_ns)


def plans(lane: Lane, room: Room) -> Iterator[StepPlan]:
    """Steps of the lane, from the smallest to the largest."""
    if lane == "decode":
        for rows in DECODE_ROWS:
            most = min(LONG_TOKENS, room.most_tokens(rows))
            for tokens in sorted({min(room.block_size, most), most} - {0}):
                yield decode_plan(rows, tokens, room)
        return
    most = room.most_tokens()
    for rows in sorted({min(max(1, room.chunk_tokens // part), most) for part in CHUNK_PARTS}):
        for prefix in sorted({0, min(LONG_TOKENS, most - rows)}):
            yield chunk_plan(rows, prefix, room)


def decode_plan(rows: int, tokens: int, room: Room) -> StepPlan:
    """Rows of as many sequences, each of which sees so many tokens."""
    return _plan(
        positions=[tokens - 1] * rows,
        spans=[(row, tokens - 1, tokens) for row in range(rows)],
        room=room,
        sampled=range(rows),
    )


def chunk_plan(rows: int, prefix: int, room: Room) -> StepPlan:
    """Rows of one prompt behind so many tokens of it."""
    stop = prefix + rows
    return _plan(
        positions=list(range(prefix, stop)),
        spans=[(0, prefix, stop)],
        room=room,
        sampled=range(rows - 1, rows),
        is_decode=False,
    )


def _layout(spans: list[tuple[int, int, int]], room: Room, sight: Sight) -> Layout:
    """Of spans `(first row, start, stop)`, each of a sequence that lies here in a run of its own."""
    own = []
    for i, (first_row, start, stop) in enumerate(spans):
        count = -(-stop // room.block_size)
        run = Run.of(room.block_size, [(0, stop)], range(i * count, (i + 1) * count))
        own.append(read_run(run, first_row, start, stop, sight))
    return Layout(
        num_rows=sum(stop - start for _, start, stop in spans),
        own=[reading for reading in own if reading is not None],
        dispatched_rows=[],
        dispatched={},
        received={},
        others=[],
    )


def _plan(
    positions: list[int], spans: list[tuple[int, int, int]], room: Room, sampled: range, *, is_decode: bool = True
) -> StepPlan:
    num_rows = len(positions)
    layout, *others = [_layout(spans, room, sight) for sight in room.sights]
    return StepPlan(
        token_ids_T=[0] * num_rows,
        positions_T=positions,
        pending=[],
        # no sequence has such a number: the sampler keeps what it knows of one from step to step
        sampled=[SampledRow(row, -1 - row, positions[row] + 1, _GREEDY, 0) for row in sampled],
        scored=[],
        slots_T=[-1] * num_rows,
        layout=layout,
        other_layouts=others,
        needs_logits=True,
        is_decode=is_decode,
    )
