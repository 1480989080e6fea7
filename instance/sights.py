"""What rows see in each layer of a model, as transformers itself would mask it.

transformers makes the mask of each kind of layer (all, a sliding window, chunks) with the mask function of the attention in
use, and gives it the rule: whether a query sees a key, by their places. `Rules` stands in for that function while a model runs
two rows. It makes no mask, only a tensor by which the rule is known again at the layer that is called with it.

Each rule is tried at the places where windows and chunks begin and end, up to the longest context: what comes out isn't what a
config says, but what its layers would be masked with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionMaskInterface, PretrainedConfig

from kvstore.sight import FULL, Sight

_FAR = 1 << 20
"""Places that are tried of a model that doesn't say how many it takes."""
_SPREAD = 512
"""Keys over the whole text that a rule is tried with, beside those where something may begin or end."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What one kind of mask is made from."""

    stand_in: torch.Tensor
    is_seen: Callable[..., Any]
    """(batch, head, query, key) -> whether it is seen."""
    size: int | None
    """Of the window or chunk."""

    def sight(self, max_context: int | None) -> Sight | None:
        """What the rule lets rows see, in texts of up to so many tokens; None if that is neither all, a window nor chunks."""
        context = max_context or _FAR
        if self.stand_in.device.type == "meta":  # a rule may hold tensors, which have no values there
            return self._assumed(context)
        sizes = [] if self.size is None or self.size >= context else [self.size]
        candidates = [FULL, *(Sight(window=n) for n in sizes), *(Sight(chunk=n) for n in sizes)]
        return next((sight for sight in candidates if self._is(sight, context)), None)

    def _assumed(self, context: int) -> Sight:
        if self.size is None or self.size >= context:
            return FULL
        return Sight(chunk=self.size) if "chunk" in _names(self.is_seen) else Sight(window=self.size)

    def _is(self, sight: Sight, context: int) -> bool:
        size, device = self.size or 1, self.stand_in.device
        near = (-2, -1, 0, 1, 2)
        queries = {n * size + by for n in (0, 1, 2, 3) for by in near} | {context // 2, context - 1}
        for query in sorted(place for place in queries if 0 <= place < context):
            first = sight.first(query)
            edges = {at + by for at in (0, first, query) for by in near} | {place - size for place in (query, query + 1)}
            keys = sorted({*range(0, query + 1, query // _SPREAD + 1), *(place for place in edges if 0 <= place < context)})
            keys_S = torch.tensor(keys, device=device)
            seen_S = torch.as_tensor(self.is_seen(0, 0, torch.tensor(query, device=device), keys_S))
            if not torch.equal(seen_S.expand(len(keys)), (keys_S >= first) & (keys_S <= query)):
                return False
        return True


class Rules:
    """Those of the masks that a model has asked for."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []

    def __call__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: Callable[..., Any],
        device: torch.device,
        local_size: int | None = None,
        **_: object,
    ) -> torch.Tensor:
        """transformers' mask function."""
        stand_in = torch.zeros((batch_size, 1, q_length, kv_length), dtype=torch.bool, device=device)
        self._rules.append(Rule(stand_in, mask_function, local_size))
        return stand_in

    def of(self, mask: torch.Tensor | None) -> Rule | None:
        """The rule that a layer's mask stands for; None for a mask that isn't one of these."""
        return next((rule for rule in self._rules if rule.stand_in is mask), None)


@contextmanager
def ruled_as(name: str) -> Iterator[Rules]:
    """While transformers asks here for the masks of the attention of that name: else it makes none for it."""
    rules = Rules()
    AttentionMaskInterface.register(name, rules)
    try:
        yield rules
    finally:
        del AttentionMaskInterface._global_mapping[name]  # there is no other way to take one back


@contextmanager
def smaller(config: PretrainedConfig, size: int) -> Iterator[None]:
    """While the model's windows and chunks are of at most so many tokens: short texts reach beyond them."""
    names = [name for name in ("sliding_window", "attention_chunk_size") if isinstance(getattr(config, name, None), int)]
    true = {name: getattr(config, name) for name in names}
    try:
        for name, tokens in true.items():
            setattr(config, name, min(tokens, size))
        yield
    finally:
        for name, tokens in true.items():
            setattr(config, name, tokens)


def _names(function: Callable[..., Any]) -> str:
    """Of a function and those that it is made of."""
    inner = [cell.cell_contents for cell in function.__closure__ or ()]
    parts = [part for cell in inner for part in (cell if isinstance(cell, tuple | list) else (cell,)) if callable(part)]
    return " ".join([function.__qualname__, *map(_names, parts)])
