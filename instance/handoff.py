"""What a home gives to the next one, on its way in a notice."""

from gmanager.wire.messages import pack_tokens, unpack_tokens
from instance.sequence import History, Home
from instance.step import Handoff, Past


def handoff_of(home: Home, to: int) -> Handoff:
    """All that `to` needs to go on with the sequence."""
    return Handoff(
        seq=home.seq,
        to=to,
        arrival=home.arrival,
        position=home.position,
        prompt_tokens=home.prompt_tokens,
        generated=home.generated,
        last_token=home.last_token if home.committed == home.generated else None,
        params=home.params,
        holdings=home.holdings,
        past=None if home.history is None else _packed(home.history),
    )


def home_of(handoff: Handoff) -> Home:
    """The sequence at its next home."""
    return Home(
        seq=handoff.seq,
        arrival=handoff.arrival,
        params=handoff.params,
        prompt_tokens=handoff.prompt_tokens,
        position=handoff.position,
        holdings=handoff.holdings,
        generated=handoff.generated,
        committed=handoff.generated - (handoff.last_token is None),
        last_token=handoff.last_token,
        history=None if handoff.past is None else _unpacked(handoff.past),
    )


def _packed(history: History) -> Past:
    prompt, generated = pack_tokens(history.prompt), pack_tokens(history.generated)
    return Past(prompt=prompt, generated=generated, num_before=history.num_before)


def _unpacked(past: Past) -> History:
    return History(unpack_tokens(past.prompt), unpack_tokens(past.generated), past.num_before)
