"""What epochs before have left of a sequence's KV, as it is admitted."""

from collections.abc import Sequence

from distattn.layout import HeldRun, Holding
from gmanager.wire.messages import Admit, KeptPart
from instance.sequence import gaps_between
from instance.step import StepMismatch
from kvstore.ranges import Ranges


def check_kept(admit: Admit, prompt_tokens: int, *, rank: int, here: Sequence[Ranges]) -> list[tuple[int, int]]:
    """The gaps in what is told of a sequence's KV. `here`: the ranges of each run on this rank.

    Raises StepMismatch if that is another thing than is told, or no KV that the shares complete.
    """
    told = [runs for part in admit.kept if part.rank == rank for runs in part.runs]
    if told != here:
        raise StepMismatch(f"sequence {admit.seq}: rank {rank} is told that it has kept {told}, it has kept {here}")
    kept = [piece for part in admit.kept for run in part.runs for piece in run]
    gaps = gaps_between(kept, prompt_tokens)
    missing = sum(end - start for start, end in gaps)
    num_kept = sum(end - start for start, end in kept)
    num_shared = sum(share.tokens for share in admit.shares)
    ends_missing = bool(gaps) and gaps[-1][1] == prompt_tokens
    if not ends_missing or num_shared != missing or num_kept + missing != prompt_tokens:
        raise StepMismatch(
            f"sequence {admit.seq}: {prompt_tokens} tokens, of which {num_kept} were kept, {num_shared} are shared out and "
            f"{missing} are missing, in {gaps}"
        )
    if kept and admit.params.prompt_logprobs is not None:
        raise StepMismatch(f"sequence {admit.seq}: {num_kept} tokens were kept, and log-probabilities of all are wanted")
    return gaps


def holdings_of(kept: Sequence[KeptPart]) -> list[Holding]:
    """What parts of a sequence's KV that were kept are to those who attend to them."""
    held = {
        part.rank: [HeldRun(run[0][0], run[-1][1], sum(end - start for start, end in run)) for run in part.runs]
        for part in kept
        if part.runs
    }
    return [Holding(rank, held[rank]) for rank in sorted(held)]
