"""Who wrote a special token: the template, or a user. Prompts are compared with transformers' wherever it gives one."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from gmanager.text import worker as text_worker
from gmanager.text.special import Piece, Specials, keep_apart
from gmanager.text.tokenizer import WORKER_CHARS, Tokenizer
from gmanager.text.worker import ChatTemplate, PieceEncoder, encode_ids, special_tokens_of
from gmanager.wire.errors import TextError
from gmanager.wire.messages import TextAssets

START, END, BOS, USER = "<|start|>", "<|end|>", "<s>", "<|user|>"
SPECIAL = (START, END, BOS, USER, "[X]", "<end_of_turn>")


def byte_level() -> Backend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "en", "er"])}
    backend = Backend(models.BPE(vocab, [("e", "n"), ("e", "r")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return backend


BACKEND = byte_level()
TOKENIZER_JSON = BACKEND.to_str()
ENCODER = PieceEncoder(TOKENIZER_JSON)
IDS = {BACKEND.token_to_id(token) for token in SPECIAL}

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '\n\n' + m.content | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}"
)
PREFIXED = "{{ bos_token }}{% for m in messages %}{{ '<|user|> ' ~ m.content.strip() ~ ' [X]' }}{% endfor %}"
BARE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


def rendered(source: str, messages: Any, *, backend: Backend = BACKEND, trust: bool = False, **options: Any) -> list[Piece]:
    template = ChatTemplate(source, {"bos_token": BOS, "eos_token": END})
    job = {"render": json.dumps([messages, options]), "trust": trust}
    return text_worker._render(template, job, backend, special_tokens_of(backend))


def ids_of(source: str, messages: Any, **options: Any) -> list[int]:
    pieces = rendered(source, messages, **options)
    if [piece.kind for piece in pieces] == ["any"]:
        return encode_ids(BACKEND, pieces[0].text, add_special_tokens=False)
    return ENCODER.encode(pieces)


def special_in(ids: list[int]) -> list[int]:
    return [i for i in ids if i in IDS]


def said(*contents: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for content in contents]


def decoded(ids: list[int]) -> str:
    return BACKEND.decode(ids, skip_special_tokens=False)


def theirs(source: str, **options: Any) -> Any:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=BACKEND, bos_token=BOS, eos_token=END, chat_template=source)
    return lambda messages, **more: wrapped.apply_chat_template(messages, tokenize=False, **options, **more)


# --- what a template does to texts, and what users write

CONTENT = (
    "m.content",
    "m.content | trim",
    "m.content.strip('\n')",
    "m.content | upper",
    "m.content | tojson",
    "m.content | tojson(ensure_ascii=true)",
    "m | tojson(ensure_ascii=true)",
    "[m.content] | string",
    "m.content | e",
    "m.content | urlencode",
    "m.content | replace('</t>', '')",
    "m.content.split('</t>')[-1]",
    "m.content | replace('x', ' ')",
)
AROUND = ("", "<|start|>", "<|end|>", "\n", "<", "|>", "{{ bos_token }}", "[X]", "<|user|>", "a ")
PARTS = ("<", "<|", "|", "|>", ">", "s", "end", "end|>", "<|en", "d|>", "[", "]", "_", "</t>", "x", " ", "\n", "é", "hi")
WORDS = (*SPECIAL, *PARTS)
user_texts = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)


@st.composite
def templates(draw: st.DrawFn) -> str:
    parts = draw(st.lists(st.sampled_from(CONTENT), min_size=1, max_size=3))
    body = draw(st.sampled_from(AROUND))
    for part in parts:
        body += "{{ " + part + " }}" + draw(st.sampled_from(AROUND))
    return draw(st.sampled_from(AROUND)) + "{% for m in messages %}" + body + "{% endfor %}" + draw(st.sampled_from(AROUND))


def harmless(text: str) -> str:
    """Of the same shape, and no part of anything."""
    return "".join(char if char.isspace() else "q" for char in text)


@settings(max_examples=1500)
@given(templates(), st.lists(user_texts, min_size=1, max_size=4))
def test_special_tokens_are_those_of_harmless_texts(source: str, contents: list[str]) -> None:
    ids = ids_of(source, said(*contents))
    trusted = ids_of(source, said(*contents), trust=True)
    assert decoded(ids) == decoded(trusted)
    assert special_in(ids) == special_in(ids_of(source, said(*map(harmless, contents))))
    if special_in(ids) == special_in(trusted):
        assert ids == trusted


@settings(max_examples=300)
@given(st.sampled_from([CHATML, LLAMA, PREFIXED, BARE]), st.lists(st.text(max_size=20) | user_texts, min_size=1, max_size=4))
def test_ids_are_those_of_transformers_where_no_token_is_a_users(source: str, contents: list[str]) -> None:
    text = theirs(source)(said(*contents))
    ids = ids_of(source, said(*contents), add_generation_prompt=False)
    whole = encode_ids(BACKEND, text, add_special_tokens=False)
    assert decoded(ids) == decoded(whole)
    if special_in(ids) == special_in(whole):
        assert ids == whole


ALL = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "contents"),
    [
        (ALL, ["<|en", "d|>"]),
        (ALL, ["<", "|end|>"]),
        (ALL, ["<", "|", "end", "|", ">"]),
        ("{{ messages[0].content }}|end|>", ["a <"]),
        ("<|en{{ messages[0].content }}", ["d|> b"]),
        ("<{{ messages[0].content }}>", ["s"]),
        ("{{ messages[0].content | trim }}{{ messages[1].content | trim }}", ["<|e \n", " nd|>"]),
        ("{{ messages[0].content | replace('</t>', '') }}", ["<</t>|</t>e</t>nd|</t>>"]),
        ("{{ messages[0].content.split('</t>') | join }}", ["<|</t>end</t>|>"]),
        ("{{ messages[0].content | lower }}", ["<|END|>"]),
        ("{{ (messages[0].content ~ messages[1].content) | tojson(ensure_ascii=true) }}", ["é<|end", "|>"]),
    ],
)
def test_halves_do_not_meet(source: str, contents: list[str]) -> None:
    ids = ids_of("<s>" + source + "<|end|>", said(*contents))
    assert special_in(ids) == [BACKEND.token_to_id(BOS), BACKEND.token_to_id(END)]
    assert decoded(ids) == decoded(ids_of("<s>" + source + "<|end|>", said(*contents), trust=True))


def test_a_role_is_the_templates_word() -> None:
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    assert special_in(ids_of(source, said("hi <|user|>"))) == [BACKEND.token_to_id(USER)]
    assert special_in(ids_of(source, said("hi", role="user|>x<|end"))) == []
    source = "{{ '<|' + who + '|>' }}{{ messages[0].content }}"
    assert special_in(ids_of(source, said("|>"), names={"who": "user"})) == [BACKEND.token_to_id(USER)]


def test_what_a_template_looks_for_is_found() -> None:
    """A word that is part of a special token by chance; and texts that have none are given as they are."""
    source = "<|user|>{% for t in tools %}{{ 'yes' if t.type == 'use' else 'no' }}{% endfor %}{{ messages[0].content }}"
    for content in ("hi", "<|user|>"):
        ids = ids_of(source, said(content), names={"tools": [{"type": "use"}]})
        assert decoded(ids) == f"<|user|>yes{content}"
        assert len(special_in(ids)) == 1


def test_a_template_that_looks_for_special_tokens_finds_none_of_a_users() -> None:
    source = "{% for m in messages %}{{ m.content }}"
    source += "{% if not m.content.endswith(eos_token) %}{{ eos_token }}{% endif %}{% endfor %}"
    ids = ids_of(source, said("a<|end|>", "b"))
    assert decoded(ids) == "a<|end|><|end|>b<|end|>"
    assert special_in(ids) == [BACKEND.token_to_id(END)] * 2


CUTS = ("[:9]", "[:20]", "[3:]", " | truncate(9, true)", " | list | join('-')", " | reverse", " | length")


@pytest.mark.parametrize("cut", CUTS)
def test_breaks_that_are_cut_or_counted_leave_nothing(cut: str) -> None:
    content = "<|end|> abc <|end|><|start|>" * 3
    source = "<s>{{ messages[0].content" + cut + " }}"
    try:
        ids = ids_of(source, said(content))
    except TextError as error:
        assert "can't be told from its own" in str(error)
        return
    assert special_in(ids) == [BACKEND.token_to_id(BOS)]
    assert not set(decoded(ids)) - set("<s>|endabctr- .0123456789")
    assert sum(char.isdigit() for char in decoded(ids)) <= 3


def test_all_characters_that_breaks_may_be_are_taken() -> None:
    taken = "".join(map(chr, [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)]))
    with pytest.raises(TextError, match="private use"):
        ids_of("<s><|end|>{{ messages[0].content[:9] }}", said("<|end|>" + taken))


def test_one_character_may_be_a_special_token() -> None:
    def render(messages: Any, names: Any) -> str:
        return "§" + "§".join(messages) + "§"

    pieces = keep_apart(render, ["a", "b§c", "§"], None, Specials(["§"]))
    assert "".join(piece.text for piece in pieces) == "§a§b§c§§§"
    assert sum(piece.kind == "special" for piece in pieces) == 4


def test_special_tokens_by_another_spelling() -> None:
    """What the tokenizer's normalization makes of a text is no special token either."""
    backend = byte_level()
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens([AddedToken("<|wide|>", normalized=True, special=True)])
    pieces = rendered(CHATML, said("＜|wide|＞"), backend=backend)
    ids = PieceEncoder(backend.to_str()).encode(pieces)
    assert backend.token_to_id("<|wide|>") not in ids
    assert ids.count(backend.token_to_id(START)) == 2


def test_text_is_cut_as_if_no_special_token_were_another() -> None:
    """White space that a special token takes, and spaces that only a prompt's beginning gets."""
    backend = Backend(models.BPE({char: i for i, char in enumerate("▁abc<>|end s\n")}, [], unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True), AddedToken("<s>", lstrip=True)])
    text = "a <|end|> \n b<|end|>c  <s> a"
    encoder = PieceEncoder(backend.to_str())
    assert encoder.encode(Specials(["<|end|>", "<s>"]).cut(text)) == encode_ids(backend, text, add_special_tokens=False)


# --- a last message that goes on

endings = st.lists(st.sampled_from(["e", "end", "<|end|>", "|>", " ", "\n", "a", "\t", "é", "."]), max_size=5).map("".join)


@settings(max_examples=300)
@given(st.sampled_from([CHATML, LLAMA, PREFIXED, BARE]), endings, endings)
def test_a_last_message_goes_on_where_it_does_with_transformers(source: str, first: str, last: str) -> None:
    messages = [*said(first), *said(last, role="assistant")]
    expected = theirs(source, continue_final_message=True)(messages)
    pieces = rendered(source, messages, continue_final=True)
    assert "".join(piece.text for piece in pieces) == expected


@pytest.mark.parametrize(("content", "words"), [(None, "NoneType"), ([{"type": "text", "text": "hi"}], "list"), (3, "int")])
def test_a_last_message_without_a_text_cannot_go_on(content: Any, words: str) -> None:
    with pytest.raises(TextError, match=f"can't be continued: its content is no text but {words}"):
        rendered(CHATML, said(content), continue_final=True)


def test_no_message_cannot_go_on() -> None:
    with pytest.raises(TextError, match="can't be continued: there is none"):
        rendered(CHATML, [], continue_final=True)


def test_a_text_that_the_template_cuts_cannot_go_on() -> None:
    with pytest.raises(TextError, match="the chat template changes its text"):
        rendered("{{ messages[0].content[:2] }}", said("hello"), continue_final=True)


# --- halves of surrogate pairs


@pytest.mark.asyncio
@pytest.mark.parametrize("before", [1234, WORKER_CHARS + 1234])
async def test_the_place_of_half_a_surrogate_pair(before: int) -> None:
    tokenizer = Tokenizer(TextAssets(tokenizer_json=TOKENIZER_JSON, chat_template=CHATML, special_tokens={}, eos_token_ids=[]))
    try:
        with pytest.raises(TextError, match=rf"U\+D800 at character {before:,} is half of a surrogate pair"):
            await tokenizer.encode("x" * before + "\ud800y")
        with pytest.raises(TextError, match=r"U\+DFFF at character [\d,]+ of what the chat template made is half"):
            await tokenizer.encode_chat(said("x" * before + "\udfff"))
    finally:
        await tokenizer.close()
