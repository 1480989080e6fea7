"""What is wrong with a registration: by itself, and beside the cell that it is for."""

from gmanager.wire.messages import PROTOCOL, InstanceSpec, Register

MAX_CELL_SIZE = 4096
MAX_CELL_NAME = 64
MAX_HOST = 64
MAX_ROTARY = 200
MAX_DTYPE = 20
MAX_ELASTIC = 16
"""Characters."""

MAX_KV_TOKENS = 2**50
"""Most tokens of KV of one instance. Those of a whole cell fit the wire's integers."""

MAX_WINDOWS = 64
"""Tables of blocks behind the first that a model may have."""

_SAME = (
    "dtype",
    "kv_dtype",
    "tp",
    "pp",
    "pp_layers",
    "elastic_tp",
    "rotary",
    "fingerprint",
    "layers",
    "tokenizer",
    "block_size",
    "chunk_tokens",
    "vocab_size",
    "max_context",
    "windows",
)
_IN_WORDS = {
    "tp": "degree of tensor parallelism",
    "pp": "number of pipeline stages",
    "pp_layers": "number of layers in each stage",
    "elastic_tp": "--elastic-tp",
    "layers": "way to run layers",
    "rotary": "rotary scaling",
    "windows": "blocks in windows",
    "kv_dtype": "dtype of KV",
}
_IF_EMPTY = {"rotary": "the model's own", "kv_dtype": "the model's", "elastic_tp": "off"}
_POSITIVE = ("block_size", "vocab_size", "max_context", "num_blocks", "chunk_tokens", "decode_rows", "reach")


def malformed(register: Register) -> str | None:
    """What is wrong with a registration whatever the cell."""
    if register.protocol != PROTOCOL:
        return f"it speaks protocol {register.protocol}, this gManager {PROTOCOL}"
    if not (1 <= len(register.cell) <= MAX_CELL_NAME and register.cell.isprintable()):
        return f"a cell's name has 1 to {MAX_CELL_NAME} printable characters"
    if not 1 <= register.cell_size <= MAX_CELL_SIZE:
        return f"cell size must be between 1 and {MAX_CELL_SIZE}, got {register.cell_size}"
    if register.rank < 0:
        return f"RANK must not be negative, got {register.rank}"
    if register.wanted_id is not None and not 0 <= register.wanted_id < MAX_CELL_SIZE:
        return f"an instance's number must be in [0, {MAX_CELL_SIZE}), got {register.wanted_id}"
    if len(register.spec.rotary) > MAX_ROTARY or not register.spec.rotary.isprintable():
        return f"rotary frequencies are told with at most {MAX_ROTARY} printable characters, got {len(register.spec.rotary)}"
    if len(register.spec.kv_dtype) > MAX_DTYPE or not register.spec.kv_dtype.isprintable():
        return f"a dtype of KV has at most {MAX_DTYPE} printable characters, got {len(register.spec.kv_dtype)}"
    if len(register.spec.elastic_tp) > MAX_ELASTIC or not register.spec.elastic_tp.isprintable():
        return f"--elastic-tp is told with at most {MAX_ELASTIC} printable characters, got {len(register.spec.elastic_tp)}"
    if len(register.spec.host) > MAX_HOST:
        return f"a host is named with at most {MAX_HOST} characters, got {len(register.spec.host)}"
    if len(register.spec.windows) > MAX_WINDOWS or min(register.spec.windows, default=1) < 1:
        return f"there are at most {MAX_WINDOWS} windows, of 1 block at least, got {register.spec.windows[: MAX_WINDOWS + 1]}"
    for field_name in _POSITIVE:
        value = getattr(register.spec, field_name)
        if value < 1:
            return f"{field_name} must be at least 1, got {value}"
    if register.spec.num_blocks * register.spec.block_size > MAX_KV_TOKENS:
        blocks = f"{register.spec.num_blocks:,} blocks of {register.spec.block_size:,} tokens"
        return f"an instance has at most {MAX_KV_TOKENS:,} tokens of KV, got {blocks}"
    return None


def differing(spec: InstanceSpec, of_cell: InstanceSpec, cell: str) -> str | None:
    """In what an instance isn't like those of a cell of that name; None: it is."""
    for field_name in _SAME:
        own, theirs = getattr(spec, field_name), getattr(of_cell, field_name)
        if own != theirs:
            what = _IN_WORDS.get(field_name, field_name.replace("_", " "))
            if field_name == "fingerprint":
                what = "model"
                own, theirs = (f"{its.model[:40]} ({its.fingerprint[:12]})" for its in (spec, of_cell))
            if field_name in _IF_EMPTY:
                own, theirs = (value or _IF_EMPTY[field_name] for value in (own, theirs))
            return f"its {what} is {str(own)[:80]}, that of cell '{cell}' is {str(theirs)[:80]}"
    if (spec.device == "cpu") != (of_cell.device == "cpu"):
        return f"its device is {spec.device[:80]}, that of cell '{cell}' is {of_cell.device[:80]}"
    return None
