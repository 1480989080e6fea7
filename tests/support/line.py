"""Process groups of one process, in memory: who sends waits until it is received, and a wait may have a deadline."""

import threading
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta

import torch


@dataclass
class _Sent:
    content: torch.Tensor
    is_taken: bool = False


@dataclass
class Line:
    """Between all ranks that have a `LineGroup` of it."""

    begun: list[tuple[int, str]] = field(default_factory=list)
    """(rank, "send" or "receive") of each, as they began."""
    changed: threading.Condition = field(default_factory=threading.Condition)
    sent: dict[tuple[int, int], deque[_Sent]] = field(default_factory=dict)
    """(source, target) -> what has yet to be received."""
    is_closed: bool = False

    def close(self) -> None:
        """Let go of who waits, with an error."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()

    def queue(self, source: int, target: int) -> deque[_Sent]:
        return self.sent.setdefault((source, target), deque())


class LineGroup:
    """One rank's end."""

    def __init__(self, line: Line, rank: int) -> None:
        self._line = line
        self._rank = rank

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> "_Work":
        line = self._line
        with line.changed:
            line.begun.append((self._rank, "send"))
            sent = _Sent(tensors[0].clone())
            line.queue(self._rank, dst).append(sent)
            line.changed.notify_all()
        return _Work(line, sent, None, deque())

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> "_Work":
        line = self._line
        with line.changed:
            line.begun.append((self._rank, "receive"))
            return _Work(line, None, tensors[0], line.queue(src, self._rank))

    def _start_coalescing(self) -> None:
        raise RuntimeError("only on a GPU")

    def _end_coalescing(self) -> "_Work":
        raise RuntimeError("only on a GPU")


@dataclass
class _Work:
    line: Line
    sent: _Sent | None
    """That was sent."""
    place: torch.Tensor | None
    """Where what is received belongs."""
    queue: deque[_Sent]

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Raises RuntimeError if it takes longer, or the line is closed."""
        line = self.line
        with line.changed:
            seconds = None if timeout is None else timeout.total_seconds()
            if not line.changed.wait_for(lambda: line.is_closed or self._is_done(), seconds):
                raise RuntimeError(f"Timed out waiting {seconds:g} s")
            if line.is_closed:
                raise RuntimeError("Connection closed")
            if self.place is not None:
                sent = self.queue.popleft()
                self.place.copy_(sent.content)
                sent.is_taken = True
                line.changed.notify_all()
        return True

    def _is_done(self) -> bool:
        return bool(self.queue) if self.sent is None else self.sent.is_taken
