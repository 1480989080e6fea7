"""LoongServe (Wu et al., SOSP 2024): elastic sequence parallelism, the degree of each prompt and each decode by predicted time.

Its parts, and what they are here:
- the degree of a prefill by predicted time: the number of instances with which it, and the long ones that wait, end soonest;
- several *masters*: a home is whichever holder of the KV has least to do, which costs a few integers;
- scale-down without copies: KV is born where it is computed, and stays; who has no room for more of it is no home. The paper
  instead keeps a prompt's KV only at the instances that go on, while others compute it, too: each chunk travels to them.
"""

from collections.abc import Sequence

from gmanager.cluster.placement import Placement, prompt_work
from gmanager.cluster.policies.base import Outlook, Policy, Prompt, Relocation, SequenceView
from gmanager.cluster.policies.gain import best_of, homes_among_holders, relative_gain

MIN_SPEEDUP = 1.25
"""Of a prompt that takes twice as many instances, at least; each is one more for others to wait for."""


class Loong(Policy):
    """The degree of each prompt by predicted time, whatever its length; homes among holders."""

    name = "loong"
    relocates = True

    def place(self, prompt: Prompt, outlook: Outlook) -> Placement | None:
        if prompt.spread != "auto":
            return super().place(prompt, outlook)
        able = sum(view.free_blocks > 1 for view in outlook.views)
        for count in range(min(self._degree(prompt.missing, outlook), able), 1, -1):
            spread = Prompt(missing=prompt.missing, kept=prompt.kept, spread=count)
            placement = super().place(spread, outlook)
            if placement is not None and placement.is_even:
                return placement
        return super().place(Prompt(missing=prompt.missing, kept=prompt.kept, spread=1), outlook)

    def improve(self, sequences: Sequence[SequenceView], outlook: Outlook) -> Relocation | None:
        return best_of(
            (relative_gain(sequence, relocation, outlook), relocation)
            for sequence in sequences
            for relocation in homes_among_holders(sequence, outlook)
        )

    @staticmethod
    def _degree(tokens: int, outlook: Outlook) -> int:
        """How many instances should compute so many tokens: twice as many while that is `MIN_SPEEDUP` times faster, what they
        have to do already included."""
        costs, chunk = outlook.costs, outlook.chunk_tokens
        alone = costs.prefill_s(tokens, chunk=chunk)
        per_work = alone / prompt_work(tokens, outlook.reach)
        queues = sorted(view.backlog * per_work for view in outlook.views if view.free_blocks > 1)

        def end(count: int) -> float:
            return queues[count - 1] + costs.prefill_s(tokens, degree=count, chunk=chunk)

        count = 1
        while 2 * count <= min(len(queues), outlook.blocks_for(tokens)) and end(count) >= MIN_SPEEDUP * end(2 * count):
            count *= 2
        return count
