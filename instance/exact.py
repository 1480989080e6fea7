"""Whether a model, through our attention and a pool, computes what transformers' own attention computes.

What a probe of single layers can't see (a scale that depends on the place, places that are counted otherwise) shows in the
logits. Two short random texts run in steps of many rows and of one row each, one of them at the last places that the
model takes; their blocks lie in turn, and the pool holds NaN wherever nothing was written. Meanwhile windows and chunks are of
a third of the texts, in the model's config too, so that these reach far beyond them: that a layer has one, and where it begins,
shows as well as with the true size, which `instance.sights` has tried on its own. Here KV is stored in the model's dtype in any
case: what is compared is what is computed, and not how KV is rounded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from distattn.attention import DistAttention
from distattn.exchange import Exchange
from distattn.layout import Layout, read_run
from distattn.shape import AttentionShape
from instance.errors import UnsupportedModel
from instance.model import ATTENTION, TOLERANCE, Model, relative
from instance.quantised import plain_products
from instance.sights import smaller
from kvstore.format import KVFormat
from kvstore.run import Run
from kvstore.storage import KVStorage

_MORE_THAN_A_BLOCK = 9
"""Tokens of each text beyond the first block: steps of one row read both blocks."""

_AGREEING_ROWS = 0.75
"""Of a mixture of experts in half precision: where rounding chooses between two experts a row may differ by 0.4, all rounding
else by 0.05 (16 tiny mixtures in bf16). Of other models every row must agree."""


def refuse_inexact(model: Model, name: str, *, block_size: int, backend: str) -> float:
    """The relative difference from transformers' own attention. Raises UnsupportedModel if it is more than rounding."""
    found, limit = difference(model, block_size=block_size, backend=backend), TOLERANCE[model.shape.dtype]
    if not found <= limit:  # NaN is refused too
        raise UnsupportedModel(
            f"{name}: its logits through the KV pool differ from those of transformers' own attention by {found:.2g} of their "
            f"size, and rounding of {str(model.shape.dtype).removeprefix('torch.')} explains {limit:g}: it would answer wrongly"
        )
    return found


def difference(model: Model, *, block_size: int, backend: str) -> float:
    """Of logits, as `TOLERANCE` counts it: of the row that differs most, but for some where rounding chooses experts."""
    length = min(block_size + _MORE_THAN_A_BLOCK, model.max_context)
    within = max(2, length // 3)  # chunks of one token would be windows of one
    ids_2T = torch.randint(model.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    first = [0, model.max_context - length]
    chunks = [max(1, block_size - 5), 9, *[1] * 5]  # the second crosses the end of a block
    with smaller(model.module.config.get_text_config(), within):
        shape = model.shape_within(within)
        got = paged_logits(model, ids_2T.tolist(), first, chunks, block_size=block_size, backend=backend, shape=shape)
        want = eager_logits(model.module, ids_2T.tolist(), first)
    rows = relative(got, want).flatten()
    may_choose = model.shape.dtype != torch.float32 and _has_experts(model.module)
    return float(rows.quantile(_AGREEING_ROWS) if may_choose else rows.max())


def _has_experts(module: torch.nn.Module) -> bool:
    return any("experts" in name.rpartition(".")[2] for name, _ in module.named_modules())


def paged_logits(
    model: Model,
    texts: Sequence[Sequence[int]],
    first: Sequence[int],
    chunks: Sequence[int],
    *,
    block_size: int,
    backend: str,
    shape: AttentionShape | None = None,
) -> torch.Tensor:
    """Logits `[texts, T, V]` of texts of one length, text i at places from `first[i]`; a step is a chunk of each of them.

    What a row sees is counted from the beginning of its text, wherever that stands. `shape`: the model's, with other windows.
    """
    count, length = len(texts), len(texts[0])
    table_blocks = -(-length // block_size)
    tables = [tuple(range(text, count * table_blocks, count))[::-1] for text in range(count)]
    shape = shape or model.shape
    storage = KVStorage(
        num_layers=model.num_layers,
        num_blocks=count * table_blocks,
        block_size=block_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        parts=shape.parts,
        format=KVFormat(shape.dtype),
        device=model.device,
    )
    storage.fill_(torch.nan)
    attention = DistAttention(storage, shape, Exchange(None, model.device), backend=backend)  # type: ignore[arg-type]  # alone
    steps: list[torch.Tensor] = []
    model.context.attention = attention
    try:
        with torch.inference_mode():
            for start, stop in _spans(chunks, length):
                rows = stop - start
                slots = [table[i // block_size] * block_size + i % block_size for table in tables for i in range(start, stop)]
                runs = [Run.of(block_size, [(0, stop)], table[: -(-stop // block_size)]) for table in tables]
                layouts = []
                for sight in shape.sights:
                    own = [read_run(run, text * rows, start, stop, sight) for text, run in enumerate(runs)]
                    layouts.append(Layout(count * rows, [r for r in own if r is not None], [], {}, {}, []))
                attention.plan(layouts, [slots])
                ids_T = torch.tensor([token for text in texts for token in text[start:stop]], device=model.device)
                places_T = torch.tensor([place + i for place in first for i in range(start, stop)], device=model.device)
                rows_S = torch.arange(count * rows, device=model.device)
                steps.append(model.forward(ids_T, places_T, rows_S).view(count, rows, -1))
    finally:
        model.context.attention = None
    return torch.cat(steps, dim=1)


def eager_logits(module: PreTrainedModel, texts: Sequence[Sequence[int]], first: Sequence[int]) -> torch.Tensor:
    """The same of transformers alone, with its plainest attention and the mask that it makes for that, and with plain
    matrices of what weights stand for."""
    ids = torch.tensor(texts, device=module.device)
    places = torch.tensor(first, device=module.device)[:, None] + torch.arange(ids.shape[1], device=module.device)
    with _eager(module), plain_products(module), torch.inference_mode():
        out: torch.Tensor = module(input_ids=ids, position_ids=places, use_cache=False).logits
    return out


@contextmanager
def _eager(module: PreTrainedModel) -> Iterator[None]:
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(ATTENTION)


def _spans(chunks: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """`[start, stop)` of each chunk, up to `length`; the last chunk is whatever is left."""
    start = 0
    for chunk in (*chunks, length):
        stop = min(start + chunk, length)
        if stop > start:
            yield start, stop
        start = stop
