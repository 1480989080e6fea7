"""A process beside the gManager for what would stall it: long texts, and chat templates.

Encoding a million tokens holds the interpreter lock for seconds, and a chat template is a program that came with the
model: it is rendered here, in Jinja's immutable sandbox, with limits on its length, output, time and memory, and is
killed with this process if it doesn't stop. Both ends talk msgpack over a pipe; nothing is unpickled.
"""

import json
import multiprocessing
import resource
import secrets
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn, TypeVar

import jinja2
import jinja2.ext
import msgpack
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from gmanager.text.special import Piece, Specials, keep_apart
from gmanager.wire.codec import MAX_FRAME_BYTES
from gmanager.wire.errors import TextError, TextUnavailable
from gmanager.wire.messages import TextAssets, pack_tokens

T = TypeVar("T")

MAX_TEMPLATE_CHARS = 2**20
"""The longest chat templates in use have some 20,000 characters."""
MAX_RENDERED_CHARS = MAX_FRAME_BYTES
"""As much text as a client can send without a template."""
RENDER_S = 10.0
"""Time for rendering a chat: 64 MiB of messages take a second, so only a template that doesn't end takes longer."""
ENCODE_S = 120.0
"""Time for encoding one text: 64 MiB are some 16M tokens, at 4 s per million."""
START_S = 60.0
"""Added while the process starts: it imports, and reads tokenizer.json (35 MB at most), on cores that may be busy."""
MAX_MEMORY_BYTES = 16 * 2**30
"""Address space of the process. 16M tokens take about 2 GB while they are encoded."""

_MAX_ERROR_CHARS = 500


def load_backend(tokenizer_json: str) -> Backend:
    """The tokenizer, as transformers calls it: nothing cut, nothing padded. Raises TextError."""
    try:
        backend = Backend.from_str(tokenizer_json)
    except Exception as error:  # the package raises bare Exception
        raise TextError(f"tokenizer.json can't be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


class PieceEncoder:
    """Encodes pieces as one text, in which only those that are special tokens are. Raises TextError.

    To this tokenizer special tokens are text, and others stand in for those that are meant and swallow white space as they do:
    so the text between is cut, and its beginning known, as if the tokenizer had read the whole as it does.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._backend = load_backend(tokenizer_json)
        special = {i: token for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        self._backend.encode_special_tokens = True
        # nobody can write them who doesn't know them
        names = {flags: f"\ue7c0{secrets.token_hex(16)}\ue7c0" for flags in {(t.lstrip, t.rstrip) for t in special.values()}}
        stand_ins = [AddedToken(name, lstrip=left, rstrip=right, normalized=False) for (left, right), name in names.items()]
        self._backend.add_tokens(stand_ins)
        self._stand_ins = {self._backend.token_to_id(name) for name in names.values()}
        self._special = {token.content: (i, names[token.lstrip, token.rstrip]) for i, token in special.items()}

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """Token ids; none that the tokenizer adds on its own."""
        own = iter([self._special[text][0] for text, kind in pieces if kind == "special"])
        text = "".join(self._special[text][1] if kind == "special" else text for text, kind in pieces)
        ids = encode_ids(self._backend, text, add_special_tokens=False)
        return [next(own) if i in self._stand_ins else i for i in ids]


def special_tokens_of(backend: Backend) -> Specials:
    """How they are written."""
    return Specials(token.content for token in backend.get_added_tokens_decoder().values() if token.special)


def utf8(text: str, where: str = "") -> bytes:
    """Raises TextError if `text` has half of a surrogate pair, which no encoding holds. `where`: what the text is."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        what = f"U+{ord(text[error.start]):04X} at character {error.start:,}{where} is half of a surrogate pair"
        raise TextError(f"the text can't be turned into tokens: {what}") from error


def encode_ids(backend: Backend, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of `text`. `encode_batch` leaves the interpreter lock to others, `encode` does not. Raises TextError."""
    try:
        (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    except MemoryError:
        raise
    except Exception as error:  # the package raises bare Exception, for an unknown token among others
        utf8(text)
        raise TextError(f"the text can't be turned into tokens: {_short(error)}") from error
    ids: list[int] = encoding.ids
    return ids


class ChatTemplate:
    """A model's chat template with the names and filters that transformers gives it. Raises TextError."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TextError(f"the chat template has {len(source):,} characters; at most {MAX_TEMPLATE_CHARS:,} are taken")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TextError(f"the chat template can't be read: {_short(error)}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        names: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        max_chars: int = MAX_RENDERED_CHARS,
    ) -> bytes:
        """The conversation as UTF-8, ending where the assistant's answer begins, or, with `continue_final`, where the text of
        the last message ends (as transformers has it). `names`: what the template is told besides."""
        mark = secrets.token_hex(16)
        if continue_final:
            messages = [*messages[:-1], _with_end_marked(messages[-1:], mark)]
        given: dict[str, Any] = {"tools": None, "documents": None} | dict(names or {})
        given |= self._special_tokens
        given |= {"messages": messages, "add_generation_prompt": add_generation_prompt and not continue_final}
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(given):
                size += len(part)
                if size > max_chars:
                    raise TextError(f"the chat template made more than {max_chars:,} characters")
                parts.append(part)
            text = "".join(parts)
            return utf8(_up_to(mark, text) if continue_final else text, " of what the chat template made")
        except TextError:
            raise
        except Exception as error:  # a template is a program: it can raise anything
            raise TextError(f"the chat template refused the messages: {_short(error)}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its content simply stands."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it as an instance attribute)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _short(error: BaseException) -> str:
    # a template may raise half a surrogate pair, which no message can hold
    return f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS].encode(errors="replace").decode()


class TextWorker:
    """The process and the pipe to it. It starts with the first call and anew after it was killed."""

    def __init__(self, assets: TextAssets) -> None:
        self._assets = assets
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._closed = False
        self._lock = threading.Lock()
        # One thread: calls take turns, and a caller that is cancelled leaves no half-read answer in the pipe.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="text-worker")

    def encode(self, text: str, *, add_special_tokens: bool) -> Future[bytes]:
        """Packed token ids, when its turn has come. The future raises TextError."""
        return self._submit({"encode": text, "special": add_special_tokens}, ENCODE_S, lambda found: found)

    def encode_pieces(self, pieces: Sequence[Piece]) -> Future[bytes]:
        """Packed token ids as of `PieceEncoder`, when its turn has come. The future raises TextError."""
        return self._submit({"pieces": pieces}, ENCODE_S, lambda found: found)

    def render(self, messages: list[dict[str, Any]], *, trust_special: bool, **options: Any) -> Future[list[Piece]]:
        """A conversation in the chat template, when its turn has come: one piece, unless special tokens in it are to stay text.
        `options`: of `ChatTemplate.render`. The future raises TextError."""
        # as JSON, which is what clients wrote: msgpack has no integers of more than 64 bits
        job = {"render": json.dumps([messages, options]), "trust": trust_special}
        return self._submit(job, RENDER_S, lambda found: [Piece(*piece) for piece in found])

    def close(self) -> None:
        """End the process; jobs that wait fail."""
        self._closed = True
        with self._lock:
            if self._process is not None:
                self._process.kill()
        self._thread.shutdown()
        self._discard()

    def _submit(self, job: Mapping[str, Any], timeout_s: float, read: Callable[[Any], T]) -> Future[T]:
        if self._closed:
            raise TextUnavailable("the service is ending")
        return self._thread.submit(lambda: read(self._call(job, timeout_s)))

    def _call(self, job: Mapping[str, Any], timeout_s: float) -> Any:
        if self._closed:
            raise TextUnavailable("the service is ending")
        try:
            packed = msgpack.packb(job)
        except UnicodeEncodeError:
            utf8(job.get("encode", ""))
            raise
        pipe = self._pipe
        if pipe is None:
            timeout_s += START_S
            pipe = self._start()
        try:
            pipe.send_bytes(packed)
            if not pipe.poll(timeout_s):
                self._discard()
                raise TextError(f"turning the text into tokens took longer than {timeout_s:g} s")
            answer = msgpack.unpackb(pipe.recv_bytes())
        except (EOFError, OSError) as error:
            self._discard()
            raise TextUnavailable("the process that turns text into tokens died (out of memory?)") from error
        if "error" in answer:
            raise TextError(answer["error"])
        return answer["result"]

    def _start(self) -> Connection:
        # spawn: the gManager has threads (ZeroMQ's, the tokenizer's), and forking those is not safe.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        assets = self._assets
        process = context.Process(
            target=_serve,
            args=(theirs, assets.tokenizer_json, assets.chat_template, assets.special_tokens),
            name="distattn-text",
            daemon=True,
        )
        process.start()
        # The child alone must hold its end, or we would not see that it died.
        theirs.close()
        with self._lock:
            self._pipe, self._process = ours, process
            if self._closed:
                process.kill()
        return ours

    def _discard(self) -> None:
        with self._lock:
            pipe, process = self._pipe, self._process
            self._pipe = self._process = None
        if pipe is not None:
            pipe.close()
        if process is not None:
            process.kill()
            process.join()
            process.close()


def _render(template: ChatTemplate, job: Mapping[str, Any], backend: Backend, specials: Specials) -> list[Piece]:
    messages, options = json.loads(job["render"])
    names = options.pop("names", None)

    def render(messages: Any, names: Any) -> str:
        return template.render(messages, names=names, **options).decode()

    if job["trust"]:
        return [Piece(render(messages, names), "any")]
    pieces = keep_apart(render, messages, names, specials)
    (text, kind) = pieces[0] if pieces else ("", "any")
    return specials.cut(text) if kind == "any" and _has_others(backend, text) else pieces


def _has_others(backend: Backend, text: str) -> bool:
    """Whether the tokenizer would read special tokens that aren't written as such (in full-width characters, say)."""
    normalizer = backend.normalizer
    if normalizer is None:
        return False
    loose = [token.content for token in backend.get_added_tokens_decoder().values() if token.special and token.normalized]
    if not loose:
        return False
    normalized = normalizer.normalize_str(text)
    return any(normalized.count(normalizer.normalize_str(token)) > text.count(token) for token in loose)


def _with_end_marked(last: Sequence[dict[str, Any]], mark: str) -> dict[str, Any]:
    """The message with a mark at its text's end, as transformers does it: a space after it tells whether the template trims.
    Raises TextError if it has no text."""
    content = last[0].get("content") if last else None
    if not isinstance(content, str):
        what = "there is none" if not last else f"its content is no text but {type(content).__name__}"
        raise TextError(f"the last message can't be continued: {what}")
    return last[0] | {"content": f"{content}{mark} "}


def _up_to(mark: str, text: str) -> str:
    """Raises TextError if the mark doesn't stand in what was rendered."""
    kept, found, after = text.rpartition(mark)
    if not found:
        raise TextError("the last message can't be continued: the chat template changes its text")
    return kept if after.startswith(" ") else kept.rstrip()


def _serve(pipe: Connection, tokenizer_json: str, chat_template: str | None, special_tokens: dict[str, str]) -> None:
    """The child's main loop; ends when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MAX_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    backend = load_backend(tokenizer_json)
    encoder: PieceEncoder | None = None
    specials = special_tokens_of(backend)
    template: ChatTemplate | None = None
    while True:
        try:
            job = msgpack.unpackb(pipe.recv_bytes())
        except EOFError:
            return
        try:
            if "encode" in job:
                result: Any = pack_tokens(encode_ids(backend, job["encode"], add_special_tokens=job["special"]))
            elif "pieces" in job:
                encoder = encoder or PieceEncoder(tokenizer_json)
                result = pack_tokens(encoder.encode([Piece(*piece) for piece in job["pieces"]]))
            else:
                if template is None:
                    if chat_template is None:
                        raise TextError("this model has no chat template")
                    template = ChatTemplate(chat_template, special_tokens)
                result = _render(template, job, backend, specials)
            answer: dict[str, Any] = {"result": result}
        except TextError as error:
            answer = {"error": str(error)}
        except MemoryError:
            answer = {"error": "turning the text into tokens takes more memory than is allowed"}
        pipe.send_bytes(msgpack.packb(answer))
