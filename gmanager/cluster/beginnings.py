"""Which sequences begin with the same blocks: a tree of their digests, pure.

    ── a b ──┬── c d      sequences 1 and 2 begin with a b; 1 goes on with c d, 2 with e, and 3 has a alone:
             └── e        then a and b are two nodes

A node has the digests of consecutive blocks, packed: those with which all of its sequences go on, so what each has ends with a
node. It costs as many bytes as digests that differ, not a dictionary's entry for each; a sequence that begins as no other does
is one node, whose bytes are those of its chain.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from gmanager.cluster.chain import DIGEST_BYTES, Chain, num_common


@dataclass(slots=True, eq=False)
class _Node:
    edge: bytes
    """Digests of its blocks, which follow those of its parent."""
    seqs: dict[int, None]
    """Who has all of them, the newest last."""
    children: dict[bytes, "_Node"] = field(default_factory=dict)
    """By their first digest."""


class Beginnings:
    """Of sequences, each listed with so many of its first blocks."""

    def __init__(self) -> None:
        self.num_listed: dict[int, int] = {}
        """seq -> blocks."""
        self._root = _Node(b"", {})

    def note(self, seq: int, digests: bytes, count: int) -> None:
        """Let a sequence be found by so many of its first digests, whatever it was."""
        before = self.num_listed.pop(seq, 0)
        if count > before:
            self._lengthen(seq, digests, DIGEST_BYTES * before, DIGEST_BYTES * count)
        elif count < before:
            self._shorten(seq, digests, DIGEST_BYTES * before, DIGEST_BYTES * count)
        if count:
            self.num_listed[seq] = count

    def longest(self, digests: bytes) -> tuple[int, Iterable[int]]:
        """How many of the first digests somebody has, and who, the newest first."""
        node, at = self._root, 0
        while (child := node.children.get(digests[at : at + DIGEST_BYTES])) is not None:
            common = _common(child, digests, at)
            node, at = child, at + common
            if common < len(child.edge):
                break
        return at // DIGEST_BYTES, reversed(node.seqs)

    def _lengthen(self, seq: int, digests: bytes, before: int, end: int) -> None:
        """`before`, `end`: bytes of the digests by which it was found and is to be."""
        node, at = self._root, 0
        while at < end:
            first = digests[at : at + DIGEST_BYTES]
            child = node.children.get(first)
            if child is None:
                child = node.children[first] = _Node(digests[at:end], {})
            common = min(_common(child, digests, at), end - at)
            if common < len(child.edge):
                _split(child, common)
            node, at = child, at + common
            if at > before:
                child.seqs[seq] = None
        self._join(digests)

    def _shorten(self, seq: int, digests: bytes, before: int, end: int) -> None:
        """As `_lengthen`."""
        node, at = self._root, 0
        while at < before:
            first = digests[at : at + DIGEST_BYTES]
            child = node.children[first]
            if at < end < at + len(child.edge):
                _split(child, end - at)
            if at >= end:
                del child.seqs[seq]
                if not child.seqs:  # nor has anybody what follows it
                    del node.children[first]
                    break
            node, at = child, at + len(child.edge)
        self._join(digests)

    def _join(self, digests: bytes) -> None:
        """Nodes on the way of these digests whose sequences are the same become one."""
        node, at = self._root, 0
        while (child := node.children.get(digests[at : at + DIGEST_BYTES])) is not None:
            while len(child.children) == 1:
                (only,) = child.children.values()
                if len(only.seqs) < len(child.seqs):
                    break
                child.edge, child.children = _joined(child, only, digests, at), only.children
            node, at = child, at + len(child.edge)

    def validate(self, chains: Mapping[int, Chain]) -> None:
        """Raises RuntimeError if sequences are found by others than their own digests, or the tree isn't as small as it can
        be."""
        found = 0
        for node, child in self._pairs():
            only = len(child.children) == 1 and len(next(iter(child.children.values())).seqs) == len(child.seqs)
            is_part = node is self._root or child.seqs.keys() <= node.seqs.keys()
            if only or not child.seqs or not is_part or node.children.get(child.edge[:DIGEST_BYTES]) is not child:
                raise RuntimeError(f"sequences {list(child.seqs)} are below {list(node.seqs)}")
            found += len(child.seqs)
        for seq, count in self.num_listed.items():
            node, at = self._root, 0
            while at < DIGEST_BYTES * count:
                node = node.children[chains[seq].digests[at : at + DIGEST_BYTES]]
                if seq not in node.seqs or chains[seq].digests[at : at + len(node.edge)] != node.edge:
                    raise RuntimeError(f"sequence {seq} is not found by its digests")
                at, found = at + len(node.edge), found - 1
            if at != DIGEST_BYTES * count:
                raise RuntimeError(f"sequence {seq} is listed with {count} blocks, found by {at // DIGEST_BYTES}")
        if found:
            raise RuntimeError("sequences are found that are not listed")

    def _pairs(self) -> Iterator[tuple[_Node, _Node]]:
        """Each node and each of those below it."""
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            yield from ((node, child) for child in node.children.values())


def _common(node: _Node, digests: bytes, at: int) -> int:
    """Bytes with which a node and the digests from there on begin alike."""
    return DIGEST_BYTES * num_common(node.edge, digests, at)


def _split(node: _Node, at: int) -> None:
    """The rest of its blocks become a node below it."""
    rest = _Node(node.edge[at:], dict(node.seqs), node.children)
    node.edge, node.children = node.edge[:at], {rest.edge[:DIGEST_BYTES]: rest}


def _joined(node: _Node, below: _Node, digests: bytes, at: int) -> bytes:
    """Blocks of both. Those of a chain, if that has them: who has all of a chain takes no bytes of its own."""
    whole = digests[at : at + len(node.edge) + len(below.edge)]
    return whole if whole.endswith(below.edge[-DIGEST_BYTES:]) else node.edge + below.edge
