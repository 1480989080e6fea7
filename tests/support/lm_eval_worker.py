"""lm-eval in a process of its own: a task scored by transformers, and by a server of completions; run by
`tests/http/test_lm_eval.py`.

Argument: a JSON file with `folder` (model and tokenizer), `url` (of `/v1/completions`), `name` (of the model there), `tasks`
(lm-eval's own configurations) and `out` (where the answers go: backend -> task -> one list of answers for each document).
"""

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

CONTEXT = 511
"""lm-eval keeps one of the model's 512 tokens free for the one that the server generates beyond a prompt."""
NEWLINE = 10
"""Stands before a rolling text: the tokenizer has no token for its beginning."""

VARIANTS: dict[str, dict[str, Any]] = {
    "token ids": {"tokenized_requests": True},
    "text": {"tokenized_requests": False},
    "batches at once": {"tokenized_requests": True, "batch_size": 3, "num_concurrent": 4},
}


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    alone = {"pretrained": given["folder"], "dtype": "float32", "max_length": CONTEXT - 1, "prefix_token_id": NEWLINE}
    answers = {"transformers": score("hf", alone, given["tasks"], device="cpu")}
    for name, variant in VARIANTS.items():
        served = {
            "model": given["name"],
            "tokenizer": given["folder"],
            "tokenizer_backend": "huggingface",
            "base_url": given["url"],
            "max_length": CONTEXT + 1,
            "max_retries": 1,
            "custom_prefix_token_id": NEWLINE,
        }
        answers[name] = score("local-completions", served | variant, given["tasks"])
    Path(given["out"]).write_text(json.dumps(answers))


def score(backend: str, model: dict[str, Any], tasks: list[dict[str, Any]], **rest: Any) -> dict[str, list[list[Any]]]:
    """What the backend answered to each document of each task."""
    ours = TaskManager(include_defaults=False)  # to read the ten thousand that it brings takes 9 s
    results = lm_eval.simple_evaluate(
        model=backend, model_args=model, tasks=tasks, task_manager=ours, log_samples=True, bootstrap_iters=0, **rest
    )
    return {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in results["samples"].items()
    }


if __name__ == "__main__":
    main()
