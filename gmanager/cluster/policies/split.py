"""Prefill and decode on instances of their own (Splitwise, DistServe, TetriInfer), by the roles that they were started with.

A prompt is computed where `--role prefill` is, and as soon as its first token is there, a decode instance is its home: a few
integers, so the second token waits for no copy. Rows travel to the KV until it has followed: run by run, into blocks that are
reserved before, beside the steps. The papers push KV, layer by layer, while prefill goes on, since there a decode can't
begin before all of it is there.

Back-pressure: a decode instance takes a home only if it has room for all KV that will follow, its own and that of those which
were sent there before, and for what they generate next (`Outlook.room_at`); until then the sequence decodes where it was
computed. Prompts that cost a decode instance no more than a few of its steps are computed there.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from gmanager.cluster.placement import RESERVE_BLOCKS, InstanceView, Placement, choose_target
from gmanager.cluster.policies.base import NewHome, Outlook, Policy, Prompt, Relocation, SequenceView
from gmanager.cluster.policies.gain import copies_home

STEPS_IN_PLACE = 2
"""A prompt that takes no longer than so many decode steps is computed where it will decode."""


class Split(Policy):
    """Prompts on prefill instances, homes on decode instances; `mixed` ones are both."""

    name = "split"
    relocates = True

    def wrong_with(self, roles: Collection[str]) -> str | None:
        missing = [role for role in ("prefill", "decode") if not {role, "mixed"}.intersection(roles)]
        if missing:
            return f"policy split has no instance with --role {missing[0]}, or mixed: all do both"
        return None if set(roles) - {"mixed"} else "policy split has no instance with a --role: all do both"

    def place(self, prompt: Prompt, outlook: Outlook) -> Placement | None:
        for allowed in self._preferences(prompt, outlook):
            views = [view if view.rank in allowed else _closed(view) for view in outlook.views]
            placement = super().place(prompt, replace(outlook, views=views))
            if placement is not None:
                return placement
        return None

    def _preferences(self, prompt: Prompt, outlook: Outlook) -> Iterable[set[int]]:
        """Sets of instances that may compute it, the best first."""
        prefill, decode = _ranks(outlook.views, "prefill"), _ranks(outlook.views, "decode")
        if not prefill or not decode:
            yield {view.rank for view in outlook.views}  # one side is missing: all do both
            return
        if self._is_cheap(prompt, outlook, decode):
            yield decode
        yield prefill
        ever = sum(outlook.views[rank].total_blocks - 1 for rank in prefill)
        if outlook.blocks_for(prompt.missing) > ever:
            yield prefill | decode

    @staticmethod
    def _is_cheap(prompt: Prompt, outlook: Outlook, decode: set[int]) -> bool:
        views = [outlook.views[rank] for rank in sorted(decode)]
        step_s = min(outlook.costs.decode_step_s(max(1, v.rows), v.held, v.sent, v.served) for v in views)
        return outlook.costs.prefill_s(prompt.missing, chunk=outlook.chunk_tokens) <= STEPS_IN_PLACE * step_s

    def next_home(self, views: Sequence[InstanceView], home: int) -> int | None:
        decode = _ranks(views, "decode")
        target = choose_target([view for view in views if view.rank in decode], home=home)
        return choose_target(views, home=home) if target is None else target

    def looks_at(self, outlook: Outlook) -> Collection[int]:
        decode = _ranks(outlook.views, "decode")
        return _ranks(outlook.views, "prefill") - decode if decode else ()

    def improve(self, sequences: Sequence[SequenceView], outlook: Outlook) -> Relocation | None:
        prefill, decode = _ranks(outlook.views, "prefill"), _ranks(outlook.views, "decode")
        only_prefill = prefill - decode
        if not only_prefill or not decode:
            return None
        for sequence in sequences:
            if sequence.home in only_prefill and sequence.can_move:
                kv = [*sequence.held.values(), sequence.growth]
                needed = sum(map(outlook.blocks_for, kv)) + RESERVE_BLOCKS
                able = [view for view in outlook.views if view.rank in decode and outlook.room_at(view) >= needed]
                able = [view for view in able if view.homes < view.max_homes]
                if able:
                    return NewHome(sequence.seq, min(able, key=lambda v: (v.rows, v.held, v.rank)).rank)
            elif sequence.home in decode:
                behind = copies_home(sequence, outlook, only_prefill.intersection(sequence.copyable))
                if behind:
                    return behind[0]
        return None


def _ranks(views: Sequence[InstanceView], role: str) -> set[int]:
    return {view.rank for view in views if view.role in (role, "mixed") and view.total_blocks}


def _closed(view: InstanceView) -> InstanceView:
    """It takes no part."""
    return replace(view, free_blocks=0, total_blocks=0, max_homes=0)
