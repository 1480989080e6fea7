"""What a gateway says of requests that would miss an objective, with a real service behind it."""

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from gmanager import RequestRefused, SamplingParams
from gmanager.cluster import forecast
from gmanager.cluster.pace import LEAST
from gmanager.gateway.errors import translate
from gmanager.server import Server
from gmanager.wire.messages import RefusalReason
from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import serve
from tests.support.tiny import make_model

PROMPT = "x" * 60
"""As many tokens; the pool holds two of them."""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


class HalfASecond:
    """A `Predictor` by which no test depends on how fast this machine is."""

    def prefill_s(self, work: float) -> float:
        return 0.5

    def decode_step_s(self, rows: int) -> float:
        return 0.01


def expect(server: Server) -> None:
    (sequences,) = server._cluster._cells.sequences.values()
    sequences._forecast.predictor = HalfASecond()


@pytest.mark.parametrize(
    ("reason", "after", "want"),
    [
        ("overloaded", 2.1, (429, "rate_limit_exceeded", "3")),
        ("overloaded", 0.01, (429, "rate_limit_exceeded", "1")),
        ("unreachable", None, (422, "objective_unreachable", None)),
        ("full", None, (429, "queue_full", "1")),
    ],
)
def test_refusals_as_answers(reason: RefusalReason, after: float | None, want: tuple[int, str, str | None]) -> None:
    error = translate(RequestRefused("why", reason, after))
    assert (error.status_code, error.code, (error.headers or {}).get("retry-after")) == want


async def test_an_objective_that_would_be_missed(farm: Farm, llama: Path) -> None:
    async with (
        serve(farm, 1, Setup(model=llama, kv_tokens=128)) as service,
        gateway(service.server.address) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as http,
    ):
        expect(service.server)
        body: dict[str, Any] = {"model": str(llama), "prompt": PROMPT, "max_tokens": 40, "ignore_eos": True}
        turns = {"model": str(llama), "max_tokens": 20, "messages": [{"role": "user", "content": "x" * 40}]}
        for _ in range(LEAST):
            answer = await http.post("/v1/completions", json=body | {"slo_ttft": 0.1})
            assert answer.status_code == 200, "nothing is known yet"
        never = await http.post("/v1/completions", json=body | {"slo_ttft": 1e-6})
        assert never.status_code == 422
        assert "retry-after" not in never.headers
        error = never.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "objective_unreachable")
        told = r"objective TTFT 1e-06 s: a prompt of 60 tokens, 48 of them there already, takes [\d.e-]+ s alone here at best"
        assert re.fullmatch(told, error["message"])
        asks = [http.post("/v1/completions", json=body | {"slo_ttft": 0.5, "stream": at == 7}) for at in range(8)]
        answers = await asyncio.gather(*asks)
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 1 <= len(refused) < 8, "the first finds memory"
        for answer in refused:
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert error["message"].startswith(
                "objective TTFT 0.5 s: a prompt of 60 tokens, 48 of them there already, is expected to have its first token"
            )
        answers = await asyncio.gather(*(http.post("/v1/messages", json=turns | {"slo_ttft": 0.5}) for _ in range(8)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert refused
        assert all((answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error") for answer in refused)
        with pytest.raises(RequestRefused) as raised:
            async for _ in service.client.generate(PROMPT, SamplingParams(max_tokens=2), slo_ttft_s=1e-6):
                pass
        assert (raised.value.reason, raised.value.retry_after_s) == ("unreachable", None)
        metrics = (await http.get("/metrics")).text
        assert 'distattn:requests_refused_total{reason="unreachable"} 2.0' in metrics
        assert "distattn:requests_met_slo_total" in metrics
        assert 'distattn:requests_missed_slo_total{objective="tpot"} 0.0' in metrics


async def test_goodput_counts_what_was_met(farm: Farm, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By objectives that every request meets, or none does; those are not refused beforehand here."""
    monkeypatch.setattr(forecast, "DOUBT", float("inf"))
    async with serve(farm, 1, Setup(model=llama), slo_ttft_s=1e-9) as service:
        for own in (None, None, 1e9):
            async for _ in service.client.generate("x", SamplingParams(max_tokens=4), slo_ttft_s=own, slo_tpot_s=1e9):
                pass
        observed = (await service.client.stats()).observed
        assert (observed.met_slo, observed.missed_ttft, observed.missed_tpot) == (1, 2, 0)
