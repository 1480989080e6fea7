"""What a request is to reach, and whether it did: pure, times in seconds.

Submit ──────── TTFT ────────> first token ──TPOT x (tokens - 1)──> last token
"""

from dataclasses import dataclass

from gmanager.wire.messages import Submit


@dataclass(frozen=True, kw_only=True, slots=True)
class Objectives:
    """None: anything will do."""

    ttft_s: float | None = None
    """From the Submit to the first token."""
    tpot_s: float | None = None
    """From the first token to the last, by the number of tokens between."""

    def __bool__(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    def of(self, submit: Submit) -> "Objectives":
        """A request's: what it says itself goes before what holds for all."""
        own = Objectives(ttft_s=submit.slo_ttft_s, tpot_s=submit.slo_tpot_s)
        return Objectives(
            ttft_s=self.ttft_s if own.ttft_s is None else own.ttft_s,
            tpot_s=self.tpot_s if own.tpot_s is None else own.tpot_s,
        )

    def missed(self, ttft_s: float, tpot_s: float | None) -> tuple[bool, bool]:
        """Whether the first was missed, and whether the second was. `tpot_s` None: there were fewer than two tokens."""
        return (
            self.ttft_s is not None and ttft_s > self.ttft_s,
            self.tpot_s is not None and tpot_s is not None and tpot_s > self.tpot_s,
        )


NO_OBJECTIVES = Objectives()
