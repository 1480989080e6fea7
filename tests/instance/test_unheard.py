"""Outputs that a gManager may not have."""

from gmanager.wire.messages import Outputs, SequenceOutput
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
    first = [Tokens(request=10, index=0, token_ids=[0]), Tokens(request=20, index=5, token_ids=[0])]
    assert unheard.report() == [*first, Tokens(request=10, index=1, token_ids=[1])]
    unheard.hear(0)
    assert len(unheard.report()) == 3
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
    assert [tokens.index for tokens in unheard.report()] == [0, 1]
    unheard.cut()  # and once more
    assert [tokens.index for tokens in unheard.report()] == [0, 1]
    unheard.forget_left()
    unheard.add(outputs((1, 2)), ORIGINS, is_sent=True)
    assert [tokens.index for tokens in unheard.report()] == [2]
    unheard.hear(1)
    assert unheard.report() == []
