"""lm-eval's `local-completions` against the gateway: the log-likelihoods that its transformers backend gives for the model."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gmanager import AsyncClient, SamplingParams
from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import serve
from tests.support.tiny import make_model

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-3
WORDS = "the,quiet,river,café,holds,17,stones,雪,and,😀,under,its,old,bridge;,none,of,them,moves".split(",")  # noqa: SIM905


async def documents(client: AsyncClient) -> list[dict[str, Any]]:
    """Questions of 10 to 300 bytes with three answers each, from a fixed seed; the second is the model's own."""
    draw = np.random.default_rng(7)

    def text(num_words: int) -> str:
        return " ".join(draw.choice(WORDS, num_words))

    async def own(question: str) -> str:
        chunks = [chunk async for chunk in client.generate(question, SamplingParams(max_tokens=1, temperature=0))]
        return "".join(chunk.text for chunk in chunks)

    found: list[dict[str, Any]] = []
    for _ in range(100):
        question = text(2 + 6 * len(found))
        answer = await own(question)
        if answer.strip() and answer.isascii() and answer.isprintable():
            choices = [" " + text(1 + int(draw.integers(5))), answer, " " + text(3)]
            found.append({"question": question, "choices": choices, "gold": len(found) % 3})
        if len(found) == 8:
            return found
    raise AssertionError(f"the model would answer only {len(found)} of 100 questions with text")


def tasks(data: Path) -> list[dict[str, Any]]:
    """Of all kinds that lm-eval has for such servers."""
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    choices = {
        "task": "tiny_choices",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    rolling = {
        "task": "tiny_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices|join(' ')}} {{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    return [source | choices, source | rolling]


async def test_log_likelihoods_are_those_of_transformers(farm: Farm, tmp_path: Path) -> None:
    data, given, out = tmp_path / "data.jsonl", tmp_path / "given.json", tmp_path / "out.json"
    folder = make_model("llama", tmp_path / "model")
    async with (
        serve(farm, 2, Setup(model=folder, served_model_name="tiny"), spread="all") as service,
        gateway(service.server.address) as url,
    ):
        data.write_text("".join(json.dumps(document) + "\n" for document in await documents(service.client)))
        asked = {"folder": str(folder), "url": f"{url}/v1/completions", "name": "tiny", "tasks": tasks(data), "out": str(out)}
        given.write_text(json.dumps(asked))
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        worker = await asyncio.create_subprocess_exec(
            sys.executable,
            str(ROOT / "tests" / "support" / "lm_eval_worker.py"),
            str(given),
            env=os.environ | offline,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await asyncio.wait_for(worker.communicate(), 120)
        assert worker.returncode == 0, said.decode(errors="replace")[-4000:]
    answers = json.loads(out.read_text())
    expected = answers.pop("transformers")
    assert list(answers) == ["token ids", "text", "batches at once"]
    assert len(np.unique([is_greedy for document in expected["tiny_choices"] for _, is_greedy in document])) == 2
    for way, got in answers.items():
        for task, wanted in expected.items():
            assert np.shape(got[task]) == np.shape(wanted)
            assert np.ravel(got[task]).tolist() == pytest.approx(np.ravel(wanted).tolist(), abs=TOLERANCE), (way, task)
