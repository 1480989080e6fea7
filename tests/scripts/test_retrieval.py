"""The retrieval model finds every key, for the reason it should: with transformers alone, and through the service."""

import json
import subprocess
import sys
from pathlib import Path

import make_retrieval_model
import numpy as np
import pytest
import torch
from _retrieval import END, FILLER, KEY, VOCABULARY, make_haystack
from make_retrieval_model import FAST_PAIRS, HEAD_DIM, POSITION_GAIN, THETA, check, write

from instance.load import load_model, load_text_assets

SCRIPTS = Path(make_retrieval_model.__file__).parent


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write(folder, getattr(torch, request.param))
    return folder


@pytest.mark.parametrize(("tokens", "block"), [(2100, 64), (1000, 16)])
def test_transformers_finds_every_key(model: Path, tokens: int, block: int) -> None:
    assert check(model, tokens, block=block, seed=3) == ((tokens - 1) // block,) * 2


def test_an_answer_is_wrong_without_its_block(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    haystack = make_haystack(1100, seed=5)
    for index in (0, 8, haystack.num_keys - 1):
        want = haystack.answer(index)
        for tokens, is_there in ((haystack.tokens, True), (haystack.without(index), False)):
            ids = torch.from_numpy(np.append(tokens, haystack.question(index)).astype(np.int64))[None]
            got = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(want), do_sample=False)
            assert (got[0, ids.shape[1] :].tolist() == want) == is_there


def test_windows_occur_once_and_only_where_they_should() -> None:
    haystack = make_haystack(1 << 21, block=16, seed=1)
    assert haystack.num_keys == 131071
    used = np.concatenate([haystack.keys, haystack.values], 1).astype(np.int64)
    windows = np.concatenate([used[:, i : i + KEY] @ (VOCABULARY ** np.arange(KEY)) for i in range(KEY + 1)])
    assert len(np.unique(windows)) == len(windows)
    assert len(haystack.tokens) == 1 << 21
    block = haystack.tokens[1 + 16 * 7 : 1 + 16 * 8]
    assert block.tolist() == [*haystack.question(7), *haystack.answer(7), *[FILLER] * 7]
    assert haystack.answer(7)[-1] == END
    assert (make_haystack(5000, seed=1).tokens == make_haystack(5000, seed=1).tokens).all()


def test_positions_are_told_apart_up_to_eight_million() -> None:
    """How far behind the best other place is in the exponent, computed as positions are rotated: fp32 angles, bf16 cosines."""
    frequencies = (THETA ** (-torch.arange(FAST_PAIRS, dtype=torch.float64) * 2 / HEAD_DIM)).float()

    def turned(position: torch.Tensor, back: int) -> torch.Tensor:
        angle = position[:, None].float() * frequencies
        low, high = (frequencies * back).cos().bfloat16().float(), -(frequencies * back).sin().bfloat16().float()
        cos, sin = angle.cos().bfloat16().float(), angle.sin().bfloat16().float()
        return torch.cat([low * cos - high * sin, high * cos + low * sin], 1).bfloat16().float() * POSITION_GAIN

    farthest, piece = 8_388_607, 1 << 18
    keys = [turned(part, 0).bfloat16() for part in torch.arange(farthest + 1).split(piece)]  # nothing is lost: they are rounded
    for at in (farthest, 1_999_999, 131_072, 77):
        for back in (1, 4):
            query = turned(torch.tensor([at]), back)[0]
            scores = torch.cat([part.float() @ query for part in keys[: at // piece + 1]])[: at + 1] * HEAD_DIM**-0.5
            best = scores.topk(2)
            assert int(best.indices[0]) == at - back
            assert float(best.values[0] - best.values[1]) > 30


def test_instances_take_the_checkpoint_as_it_is(model: Path) -> None:
    loaded = load_model(model, None, torch.device("cpu"))
    assert (loaded.num_layers, loaded.max_context) == (2, 8_388_608 + 4096)
    assert load_text_assets(model).eos_token_ids == [END]


def test_the_service_finds_keys_on_both_sides_of_borders(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    command = [sys.executable, str(SCRIPTS / "bench_retrieval.py"), "--contexts", "1100", "--kv-tokens", "2048"]
    flags = ["--chunk-tokens", "256", "--dtype", "float32", "--device", "cpu", "--questions", "2", "--out", str(out)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(out.read_text())["rows"][0]
    assert row["right"] == row["asked"] >= 9
    assert row["instances"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--check", "40"], "40 tokens hold no block of 64"), (["--check", "99", "--block", "8"], "a block of 8 tokens")],
)
def test_haystacks_that_cannot_be_are_refused(flags: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "make_retrieval_model.py"), str(tmp_path / "m"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "m").exists()
