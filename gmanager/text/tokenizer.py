"""Text to tokens and back, with the `tokenizers` package alone (transformers would bring torch with it)."""

import asyncio
import json
import re
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

from gmanager.text.special import Piece
from gmanager.text.worker import PieceEncoder, TextWorker, encode_ids, load_backend
from gmanager.wire.errors import NO_TOKENIZER, TextError
from gmanager.wire.messages import MAX_BAD_WORD_TOKENS, ChatMessage, TextAssets, unpack_tokens

WORKER_CHARS = 2**16
"""Longer texts may be over 64K tokens: they go to the worker process."""

_METASPACE = "\u2581"
"""How tokenizers of SentencePiece's kind write a space."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte, its own where it has one."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()


class Tokenizer:
    """The tokenizer and chat template of a cell's model. Close it: it may have a worker process.

    Of a model without one no text can be read, and its tokens have no text.
    """

    def __init__(self, assets: TextAssets) -> None:
        """Raises TextError if tokenizer.json can't be read."""
        self.assets = assets
        given = assets.tokenizer_json
        self._backend = Backend(models.BPE()) if given is None else load_backend(given)  # one that knows no token
        added = self._backend.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self._piece_encoder: PieceEncoder | None = None
        """Made for the first text in which special tokens are text."""
        self._worker = TextWorker(assets)
        self._added = frozenset(added)
        self._is_byte_level = '"ByteLevel"' in json.dumps(json.loads(given or "{}").get("decoder"))
        self._eos = frozenset(assets.eos_token_ids)
        self._silent = self._eos.union(self._special.values())

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> "array[int]":
        """Token ids of a text, by default with the special tokens that the tokenizer adds on its own. Raises TextError."""
        self._need_tokenizer()
        if len(text) > WORKER_CHARS:
            return unpack_tokens(await asyncio.wrap_future(self._worker.encode(text, add_special_tokens=add_special_tokens)))
        return array("I", await asyncio.to_thread(encode_ids, self._backend, text, add_special_tokens=add_special_tokens))

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage | dict[str, Any]],
        *,
        names: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        trust_special: bool = False,
    ) -> "array[int]":
        """Token ids of a conversation in the model's chat template, up to where the answer begins.

        `messages`: as the template reads them. `names`: what it is told besides. `continue_final`: the answer goes on with the
        last message, whose content is a text. Special tokens in what is given stay text, unless `trust_special`.

        Raises TextError: no template, one that refuses the messages, or one over its limits.
        """
        self._need_tokenizer()
        turns = [m if isinstance(m, dict) else {"role": m.role, "content": m.content} for m in messages]
        options = {
            "names": dict(names or {}),
            "add_generation_prompt": add_generation_prompt,
            "continue_final": continue_final,
        }
        rendering = self._worker.render(turns, trust_special=trust_special, **options)
        pieces = await asyncio.wrap_future(rendering)
        if len(pieces) == 1 and pieces[0].kind == "any":
            # The template writes the special tokens itself.
            return await self.encode(pieces[0].text, add_special_tokens=False)
        return await self._encode_pieces(pieces)

    async def _encode_pieces(self, pieces: Sequence[Piece]) -> "array[int]":
        if sum(len(piece.text) for piece in pieces) > WORKER_CHARS:
            return unpack_tokens(await asyncio.wrap_future(self._worker.encode_pieces(pieces)))
        if self._piece_encoder is None:
            self._piece_encoder = await asyncio.to_thread(PieceEncoder, self._need_tokenizer())
        return array("I", await asyncio.to_thread(self._piece_encoder.encode, pieces))

    async def encode_bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """The tokens of each word as it begins a text and, if these are as many, as it follows a space (as vLLM has it).

        Raises TextError for one that has no tokens, or more than `MAX_BAD_WORD_TOKENS`.
        """
        return await asyncio.to_thread(lambda: [ids for word in words for ids in self._bad_word(word)])

    def _bad_word(self, word: str) -> list[list[int]]:
        self._need_tokenizer()
        bare, spaced = (encode_ids(self._backend, space + word.lstrip(), add_special_tokens=False) for space in ("", " "))
        if not 1 <= len(bare) <= MAX_BAD_WORD_TOKENS:
            raise TextError(f"each of bad_words has 1 to {MAX_BAD_WORD_TOKENS} tokens, {word!r} has {len(bare)}")
        return [bare, spaced] if len(spaced) == len(bare) and spaced[0] != bare[0] else [bare]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of generated tokens, without special ones and EOS."""
        return self.decode_visible(self.visible(token_ids))

    def visible(self, token_ids: Iterable[int], *, special: bool = False, shown: Collection[int] = frozenset()) -> list[int]:
        """Those that have a text: known (vocabularies are padded), not EOS, and not special unless it is among `shown`, or
        `special` asks for all."""
        silent = self._eos if special else self._silent
        return [t for t in token_ids if (t not in silent or t in shown) and self._backend.id_to_token(t) is not None]

    def special_ids(self, texts: Iterable[str]) -> list[int]:
        """Of those that are special tokens."""
        return [self._special[text] for text in texts if text in self._special]

    def decode_visible(self, token_ids: list[int]) -> str:
        """The text of tokens that `visible` has let through."""
        return self._backend.decode(token_ids, skip_special_tokens=False)

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """The text of any tokens, special ones as they are written; nothing if the model has no tokenizer."""
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    def bytes_of(self, token_id: int) -> bytes:
        """What one token stands for, which may be part of a character; nothing for an id that the tokenizer doesn't know."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return token.encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF[char] for char in token if char in _BYTE_OF)
        if (byte := _BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes.fromhex(byte[1])
        return token.replace(_METASPACE, " ").encode()

    @property
    def reads_text(self) -> bool:
        """Whether there is a tokenizer."""
        return self.assets.tokenizer_json is not None

    def _need_tokenizer(self) -> str:
        """tokenizer.json. Raises TextError if there is none."""
        if self.assets.tokenizer_json is None:
            raise TextError(NO_TOKENIZER)
        return self.assets.tokenizer_json

    async def close(self) -> None:
        """End the worker process, if there is one; what it had to do fails."""
        await asyncio.to_thread(self._worker.close)
