"""Outputs that a gManager may not have."""

import pytest

from gmanager.wire.codec import Decoder, encode
from gmanager.wire.messages import Kept, Outputs, SequenceOutput, TokenLogprob
from gmanager.wire.messages import Unheard as Tokens
from instance.unheard import Unheard

ORIGINS = {1: (10, 0), 2: (20, 5)}
"""Sequence 2 is a later admission: its request had 5 tokens when it was admitted."""


def outputs(*tokens: tuple[int, int]) -> Outputs:
    """(sequence, index) each, whose token is its index."""
    return Outputs(epoch=1, outputs=[SequenceOutput(seq=seq, index=index, token_ids=[index]) for seq, index in tokens])


def test_what_is_acknowledged_goes() -> None:
    unheard = Unheard()
    unheard.add(outputs((1, 0), (2, 0)), ORIGINS, is_sent=True)
    unheard.add(outputs((1, 1)), ORIGINS, is_sent=True)
    both = [Tokens(request=10, index=0, token_ids=[0, 1]), Tokens(request=20, index=5, token_ids=[0])]
    assert unheard.report() == both, "what follows is one piece"
    unheard.hear(0)
    assert unheard.report() == both
    unheard.hear(1)
    assert unheard.report() == [Tokens(request=10, index=1, token_ids=[1])]
    unheard.hear(2)
    assert unheard.report() == []


def test_another_connection_counts_anew() -> None:
    unheard = Unheard()
    unheard.add(outputs((1, 0)), ORIGINS, is_sent=True)
    unheard.cut()
    unheard.add(outputs((1, 1)), ORIGINS, is_sent=False)
    unheard.hear(5)  # of the new connection, whose gManager has yet to get anything
    assert unheard.report() == [Tokens(request=10, index=0, token_ids=[0, 1])]
    unheard.cut()  # and once more
    assert unheard.report() == [Tokens(request=10, index=0, token_ids=[0, 1])]
    unheard.forget_left()
    unheard.add(outputs((1, 2)), ORIGINS, is_sent=True)
    assert [tokens.index for tokens in unheard.report()] == [2]
    unheard.hear(1)
    assert unheard.report() == []


@pytest.mark.parametrize(("tokens", "tops"), [(70_000, None), (1_200_000, None), (70_000, 5)])
def test_a_report_fits_a_message_however_long_there_was_nobody(tokens: int, tops: int | None) -> None:
    """What it can't hold is generated again: a list on the wire has 2**16 entries, a message 2**20."""
    unheard = Unheard()
    for index in range(0, tokens, 100):
        ids = list(range(index, index + 100))
        top = [] if tops is None else list(range(tops))
        logprobs = (
            None
            if tops is None
            else [TokenLogprob(token_id=0, logprob=-1.0, rank=1, top_ids=top, top_logprobs=[-1.0] * len(top)) for _ in ids]
        )
        output = SequenceOutput(seq=1, index=index, token_ids=ids, logprobs=logprobs)
        unheard.add(Outputs(epoch=1, outputs=[output]), ORIGINS, is_sent=False)
    report = unheard.report()
    kept = Decoder(Kept).decode(encode(Kept(epoch=1, free_blocks=0, shards=[], unheard=report)))
    assert kept.unheard == report
    said = [token for piece in report for token in piece.token_ids]
    assert said == list(range(len(said)))
    assert len(said) >= min(tokens, 20_000)


def test_pieces_of_several_requests() -> None:
    unheard = Unheard()
    for index in range(3):
        unheard.add(outputs((1, index), (2, index)), ORIGINS, is_sent=True)
    last = Outputs(epoch=1, outputs=[SequenceOutput(seq=1, index=3, token_ids=[3], finish_reason="stop")])
    unheard.add(last, ORIGINS, is_sent=True)
    assert unheard.report() == [
        Tokens(request=10, index=0, token_ids=[0, 1, 2, 3], finish_reason="stop"),
        Tokens(request=20, index=5, token_ids=[0, 1, 2]),
    ]
