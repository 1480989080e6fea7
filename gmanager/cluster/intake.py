"""Requests from the door to the queue of a cell, and their end wherever they are.

submit ──> refused, or waiting for a cell that serves ──bind──> tokens known: in its queue
                                                          └──> Encode ──Encoded──> in its queue
"""

from gmanager.cluster.cell import Cell
from gmanager.cluster.cells import Cells
from gmanager.cluster.chain import Chain
from gmanager.cluster.events import Encode, Encoded, Restored
from gmanager.cluster.request import Request, text_bytes
from gmanager.cluster.requests import Requests
from gmanager.cluster.turn import Turn
from gmanager.config import GManagerConfig
from gmanager.wire.messages import FinishReason, Refusal, Submit, unpack_tokens
from gmanager.wire.peer import PeerId

SCANNED_AT_ONCE = 2**14
"""Token ids: to look through 4 million takes 88 ms, and longer to hash their blocks, for which all others would wait."""


class Intake:
    """Which requests are taken in, and which cell serves each."""

    def __init__(self, config: GManagerConfig, requests: Requests, cells: Cells, turn: Turn) -> None:
        self.unwritten: str | None = None
        """Why the journal can't be written."""
        self._config = config
        self._requests = requests
        self._cells = cells
        self._turn = turn
        self._unbound: dict[int, tuple[Request, Submit]] = {}
        """Requests that wait for a cell that serves."""

    def restore(self, restored: Restored) -> None:
        """Go on with a request of the gManager before. Raises ValueError."""
        request = self._requests.restore(restored)
        if request.is_live:
            if restored.encoded is None:
                _look_through(request)
            self._unbound[request.number] = request, restored.submit

    def submit(self, peer: PeerId, submit: Submit, seed: int) -> None:
        """Take a request in, or refuse it. There is nothing wrong with it itself (`wrong_with`)."""
        refusal = self._refusal(submit)
        if refusal is not None:
            self._requests.refuse(submit, peer, refusal)
            return
        spread = self._config.spread if submit.spread is None else submit.spread
        seed = seed if submit.params.seed is None else submit.params.seed
        request = self._requests.new(submit, peer, seed, spread)
        _look_through(request)
        self._unbound[request.number] = request, submit
        self.bind()

    def _refusal(self, submit: Submit) -> Refusal | None:
        """Why a request isn't taken in now."""
        if self._requests.by_id(submit.request_id) is not None:
            return Refusal("invalid", f"request id {submit.request_id!r} is in use by another request, which has not ended")
        if self.unwritten is not None:
            return Refusal("not_ready", f"no new requests are taken: the journal can't be written ({self.unwritten})")
        served = sorted({cell.spec.model for cell in self._cells})
        if served and not self._cells.serving(submit.model):
            return Refusal("model", f"no model {(submit.model or '')[:100]!r} is served; there is {', '.join(served)}")
        if not submit.wait_for_cell and not self._cells.formed(submit.model):
            return Refusal("not_ready", "no instances are ready to serve")
        if self._requests.num_waiting >= self._config.max_queue:
            return Refusal("full", f"{self._requests.num_waiting:,} requests are waiting, as many as may (max-queue)")
        size = len(submit.token_ids or b"") + text_bytes(submit)
        if self._requests.waiting_bytes and self._requests.waiting_bytes + size > self._config.max_queue_bytes:
            what = f"prompts of {self._requests.waiting_bytes:,} bytes are waiting, and this one has {size:,}"
            return Refusal("full", f"{what}: {self._config.max_queue_bytes:,} may wait together (max-queue-bytes)")
        return None

    # --- to a cell ----------------------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Give each request that waits for a cell to one that serves its model."""
        for request, submit in list(self._unbound.values()):
            formed = self._cells.formed(submit.model)
            if not formed:
                continue
            del self._unbound[request.number]
            cell = self._choose_cell(request, submit, formed)
            request.cell_number, request.cell, request.cell_blocks = cell.number, cell.name, cell.lasting_blocks
            if (refusal := cell.why_unreadable(submit)) is not None:
                self._refuse(request, refusal)
            elif request.submit is None:  # it was restored, with its tokens
                self._queue(request)
                if request.is_live:
                    self._requests.delivery.tell(request)
            elif request.prompt and not request.params.needs_text and request.prompt_tokens <= SCANNED_AT_ONCE:
                encoded = Encoded(request.number, self._turn.now, request.prompt, highest=request.highest)
                self._requests.set_tokens(request, encoded)
                self._queue(request)
            else:
                self._requests.change(request, "encode")
                seed = cell.chain_seed(request.cache_salt) if cell.caches else None
                self._turn.emit(Encode(cell.number, request.number, submit, seed, cell.spec.block_size))

    def _choose_cell(self, request: Request, submit: Submit, formed: list[Cell]) -> Cell:
        """Of those that can ever serve it, the one where fewest wait; then the one with most free memory."""
        if len(formed) == 1:
            return formed[0]

        def rank(cell: Cell) -> tuple[bool, int, int, str]:
            never = cell.why_unreadable(submit) is not None or (
                bool(request.prompt) and cell.why_never(request.prompt, request.highest, request.params) is not None
            )
            free = sum(member.room for member in cell.members) * cell.spec.block_size
            return never, self._cells.sequences[cell.name].num_waiting, -free, cell.name

        return min(formed, key=rank)

    def on_encoded(self, event: Encoded) -> None:
        """A prompt was tokenised, or can't be."""
        request = self._requests.by_number(event.request)
        if request is None or request.state != "encoding":
            return  # it has ended meanwhile
        if event.error is not None or not event.token_ids:
            self._refuse(request, Refusal(event.refusal, event.error or "the prompt is empty: it has no tokens"))
            return
        self._requests.set_tokens(request, event)
        self._queue(request)

    def _queue(self, request: Request) -> None:
        """Its cell and its tokens are known: refuse it, or let it wait for memory."""
        cell = self._cells.of(request)
        sequences = self._cells.sequences_of(request)
        if cell is None or sequences is None:
            raise RuntimeError(f"request {request.number} is bound to cell {request.cell_number}, which is over")
        blocks = max(request.cell_blocks, cell.lasting_blocks, key=sum)
        refusal = cell.why_never(request.prompt, request.highest, request.params, blocks)
        if refusal is not None and not (request.is_restored and refusal.reason == "never"):
            self._refuse(request, refusal)
        else:
            given = request.params.max_tokens
            request.max_tokens = cell.room(request.prompt_tokens) if given is None else given
            if cell.caches and request.chain is None and request.prompt_tokens <= SCANNED_AT_ONCE:
                request.chain = Chain(cell.chain_seed(request.cache_salt), cell.spec.block_size, request.prompt)
            refusal = None if request.is_restored else sequences.refusal(request)
            if refusal is not None:
                self._refuse(request, refusal)
                return
            sequences.enqueue(request, request.waiting_since)

    def _refuse(self, request: Request, refusal: Refusal) -> None:
        request.retry_after_s = refusal.retry_after_s
        self._requests.finish(request, "error", error=refusal.text, refusal=refusal.reason)

    # --- ends ---------------------------------------------------------------------------------------------------------

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request wherever it is, and release what it holds."""
        state = request.state
        self._requests.finish(request, reason, error=error)
        self._unbound.pop(request.number, None)
        sequences = self._cells.sequences_of(request)
        if sequences is not None:
            sequences.withdraw(request, state)

    def on_stop_found(self, number: int, generated: int) -> None:
        """A stop string was found in a request's text."""
        request = self._requests.by_number(number)
        if request is None:
            self._requests.correct(number, generated)
        else:
            self._requests.cut(request, generated)
            self.end(request, "stop")

    def end_overdue(self) -> None:
        """End what nobody comes for, what doesn't go on, and what waits too long."""
        now, longest, stall = self._turn.now, self._config.max_queue_wait_s, self._config.max_stall_s
        for request in self._requests.live():
            if request.detached_at is not None and now - request.detached_at > self._config.resume_s:
                self.end(request, "abort")
            elif request.is_running and now - request.progress_at > stall:
                where = f"instance {request.home} of cell '{request.cell}'"
                self.end(request, "error", f"{where} has not gone on with the request for {stall:g} s (max-stall)")
            elif request.is_waiting and now - request.waiting_since > longest:
                what = {"waiting": "a ready cell", "encoding": "the tokenizer"}.get(request.state, "free memory")
                self.end(request, "error", f"waited {longest:g} s for {what} (max-queue-wait)")

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other."""
        formed = [cell.number for cell in self._cells if cell.is_formed]
        for request in self._requests.live():
            unbound = request.state == "waiting"
            if unbound != (request.number in self._unbound) or unbound == (request.cell_number in formed):
                raise RuntimeError(f"request {request.number} is {request.state}, bound to {request.cell_number}")
        if any(self._cells.formed(submit.model) for _, submit in self._unbound.values()):
            raise RuntimeError("a cell is ready and requests wait for one")


def _look_through(request: Request) -> None:
    """For its highest token id, if that takes no time."""
    if request.prompt_tokens <= SCANNED_AT_ONCE:
        request.highest = max(unpack_tokens(request.prompt), default=0)
