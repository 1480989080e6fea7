"""The package as such: its names, its imports, and the helper that the other tests trust."""

import importlib
import importlib.metadata
import subprocess
import sys

import pytest
import torch

import kernels
from kernels.reference import compare


def test_public_names() -> None:
    assert kernels.__all__ == [
        "MergePlan",
        "PagedAttention",
        "Segment",
        "attention_scratch_bytes",
        "gather_kv",
        "merge_states",
        "plan_attention",
        "store_kv",
    ]
    assert all(hasattr(kernels, name) for name in kernels.__all__)


def test_foreign_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"kernels": "0.9.1"}[name])
    with pytest.raises(ImportError, match=r"'kernels' 0\.9\.1 .* `pip uninstall kernels`"):
        importlib.reload(kernels)


def test_import_leaves_triton_alone() -> None:
    code = "import kernels, sys; assert not any(name.startswith('kernels') and 'triton' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_compare_measures() -> None:
    want = torch.tensor([1.0, 2.0, -torch.inf], dtype=torch.float64)
    found = compare(torch.tensor([1.5, 2.0, -torch.inf]), want, rms=0.3, max=0.5)
    assert (found.max, round(found.rms, 6)) == (0.5, round((0.25 / 3) ** 0.5, 6))
    with pytest.raises(AssertionError, match=r"max error 5\.000e-01 \(bound 4.0e-01\) at \(0,\), RMS error"):
        compare(torch.tensor([1.5, 2.0, -torch.inf]), want, rms=1, max=0.4)
    with pytest.raises(AssertionError, match="RMS error"):
        compare(torch.tensor([1.5, 2.0, -torch.inf]), want, rms=0.1, max=1)


def test_compare_trusts_nothing() -> None:
    want = torch.zeros(2, dtype=torch.float64)
    nan = torch.tensor([0.0, float("nan")])
    for actual, expected, message in [
        (nan, want, "actual values hold 1 NaN"),
        (nan, nan.double(), "NaN"),
        (want, nan.double(), "expected values hold 1 NaN"),
        (torch.tensor([0.0, torch.inf]), want, "1 of 2 values are infinite on one side only"),
        (torch.zeros(1), want, r"shape \(1,\), expected \(2,\)"),
    ]:
        with pytest.raises(AssertionError, match=message):
            compare(actual, expected, rms=1, max=1)
    with pytest.raises(ValueError, match="must be float64"):
        compare(nan, nan, rms=1, max=1)
