"""What tests of the cluster share: instances' registrations, and a cell made ready."""

from gmanager.cluster import Cluster
from gmanager.events import Action, PeerSaid, TextLoaded
from gmanager.wire import messages as m

ASSETS = m.TextAssets(tokenizer_json="{}", chat_template=None, special_tokens={}, eos_token_ids=[2])


def register(
    *, rank: int, cell_size: int, blocks: int = 8, block_size: int = 4, run_id: str = "run", **spec: object
) -> m.Register:
    """A registration; `spec` overrides fields of the InstanceSpec."""
    fields: dict[str, object] = {
        "model": "tiny",
        "fingerprint": "f00d",
        "tokenizer": "beef",
        "dtype": "float32",
        "block_size": block_size,
        "vocab_size": 5000,
        "max_context": 1000,
        "num_blocks": blocks,
        "chunk_tokens": 64,
        "device": "cpu",
    }
    return m.Register(
        protocol=m.PROTOCOL,
        cell="main",
        cell_size=cell_size,
        run_id=run_id,
        rank=rank,
        party_address=f"tcp://127.0.0.1:{9000 + rank}",
        spec=m.InstanceSpec(**(fields | spec)),  # type: ignore[arg-type]
    )


def peer(rank: int) -> bytes:
    return b"instance-%d" % rank


def ready_cell(cluster: Cluster, blocks: list[int], *, now: float = 0.0) -> list[Action]:
    """Register instances with pools of these sizes (block size 4) and go through to a ready cell of epoch 1."""
    actions: list[Action] = []
    messages: list[tuple[bytes, m.Message]] = [
        (peer(rank), register(rank=rank, cell_size=len(blocks), blocks=size)) for rank, size in enumerate(blocks)
    ]
    messages.append((peer(0), m.Text(assets=ASSETS)))
    messages.append((peer(0), m.StoreOpened(epoch=1, address="tcp://127.0.0.1:7000")))
    messages += [(peer(rank), m.Joined(epoch=1)) for rank in range(len(blocks))]
    for who, message in messages:
        actions += cluster.handle(PeerSaid(who, message, now))
        cluster.validate()
    actions += cluster.handle(TextLoaded(1, now))
    cluster.validate()
    return actions
