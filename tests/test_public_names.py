"""The names that others build on: a change here is a change of the public face."""

import inspect
import subprocess
import sys

import msgspec

import gmanager
from gmanager import AsyncClient, Chunk, Counters, Histogram, InstanceStats, Observations, RequestStats, SamplingParams, Stats


def fields(struct: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(struct)]


def test_gmanager() -> None:
    assert gmanager.__all__ == [
        "AddressError",
        "AsyncClient",
        "BadMessage",
        "CallFailed",
        "CellPerformance",
        "CellStats",
        "ChatMessage",
        "Chunk",
        "Counters",
        "DistattnError",
        "FrameTooLarge",
        "Histogram",
        "InstanceStats",
        "LanePerformance",
        "Observations",
        "PeerGone",
        "ProtocolRefused",
        "RefusalReason",
        "RequestFailed",
        "RequestRefused",
        "RequestStats",
        "SamplingParams",
        "ServiceUnreachable",
        "Stats",
        "StructuredOutputsParams",
        "TextAssets",
        "TextError",
        "TokenLogprob",
        "WireError",
    ]
    assert all(hasattr(gmanager, name) for name in gmanager.__all__)


def test_client() -> None:
    methods = {name for name, _ in inspect.getmembers(AsyncClient, inspect.isfunction) if not name.startswith("_")}
    assert methods == {"generate", "chat", "attach", "abort", "move_home", "drain", "stats", "text_assets"}
    more = ["params", "request_id", "spread", "model", "wait_for_cell", "priority", "slo_ttft_s", "slo_tpot_s", "cache_salt"]
    assert list(inspect.signature(AsyncClient.generate).parameters) == ["self", "prompt", *more]
    assert list(inspect.signature(AsyncClient.chat).parameters) == ["self", "messages", *more]


def test_sampling_params_are_vllms_with_its_defaults() -> None:
    own = {"shown_special_tokens": None}
    assert msgspec.structs.asdict(SamplingParams()) == own | {
        "max_tokens": 16,
        "min_tokens": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
        "bad_words": None,
        "structured_outputs": None,
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": None,
        "stop": None,
        "stop_token_ids": None,
        "ignore_eos": False,
        "logprobs": None,
        "prompt_logprobs": None,
    }


def test_chunk_and_stats() -> None:
    of_request = ["prompt_logprobs", "finish_reason", "error", "cached_tokens"]
    assert list(Chunk.__dataclass_fields__) == ["index", "token_ids", "text", "logprobs", *of_request]
    assert fields(Stats) == ["epoch", "cells", "instances", "requests", "counters", "observed"]
    more = ["counters", "is_draining", "slowness", "cached_tokens", "host_tokens", "disk_tokens", "role"]
    kv = ["total_tokens", "used_tokens", "free_tokens", "lent_tokens", "borrowed_tokens"]
    assert fields(InstanceStats) == ["cell", "rank", *kv, *more]
    assert {"state", "home", "kv_tokens", "home_moves", "prompt_tokens"} <= set(fields(RequestStats))
    tokens = ["steps", "rows", "rows_dispatched", "split_steps", "tokens_prefilled", "tokens_generated"]
    tiers = ["tier_bytes_down", "tier_bytes_up", "tier_tokens", "blocks_corrupt", "slots_failed", "copies_failed"]
    moves = ["home_moves", "preemptions", "moves_failed", "blocks_copied", "blocks_evicted", *tiers]
    moves += ["query_bytes", "partial_bytes", "kv_bytes"]
    times = ["step_us", "decode_us", "exchange_us", "attention_us", "notice_us"]
    assert fields(Counters) == [*tokens, *moves, *times, "dropped_messages"]
    assert fields(Histogram) == ["bounds", "counts", "total"]
    counts = ["prompt_tokens", "generated_tokens", "finished", "refused", "met_slo", "missed_ttft", "missed_tpot"]
    counts += ["prefix_queries", "prefix_hits"]
    assert fields(Observations) == ["queue_s", "ttft_s", "tpot_s", "e2e_s", *counts]


def test_the_client_imports_neither_torch_nor_transformers() -> None:
    code = "import gmanager, sys; print(sorted({'torch', 'transformers', 'triton', 'tokenizers', 'numpy'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
