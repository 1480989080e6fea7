"""Who is at the other end of a link."""

PeerId = bytes
"""A peer's name on one Listener, chosen by its Dialer at random."""
