"""Penalties: the formula in float64, on both backends, and nothing else touched."""

import pytest
import torch

from kernels.penalties import penalize
from kernels.reference import compare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["torch", "triton"]


def made_up(rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows * vocab)
    x_SV = torch.randn(rows, vocab) * 4
    x_SV[0, 3] = -torch.inf  # a token that may not come
    states_NV = torch.randint(0, 7, (rows + 2, vocab), dtype=torch.int32) * (torch.rand(rows + 2, vocab) < 0.5)
    slots_S = torch.randperm(rows + 2)[:rows]
    slots_S[rows // 2] = -1
    factors_S3 = torch.rand(rows, 3) * 2 - torch.tensor([-0.1, 1.0, 1.0])
    return x_SV, states_NV.int(), slots_S, factors_S3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (5, 123), (3, 9001)])
def test_the_formula(backend: str, rows: int, vocab: int) -> None:
    x_SV, states_NV, slots_S, factors_S3 = made_up(rows, vocab)
    want = x_SV.double()
    for row, slot in enumerate(slots_S.tolist()):
        repetition, presence, frequency = factors_S3[row].double().tolist()
        for token, state in enumerate(states_NV[slot].tolist() if slot >= 0 else []):
            x = float(want[row, token])
            if state:
                x = x / repetition if x > 0 else x * repetition
            want[row, token] = x - frequency * (state >> 1) - presence * (state >> 1 > 0)
    got = x_SV.to(DEVICE)
    penalize(got, states_NV.to(DEVICE), slots_S.to(DEVICE), factors_S3.to(DEVICE), backend=backend)
    compare(got, want, rms=1e-6, max=1e-5)
    untouched = slots_S < 0
    assert torch.equal(got.cpu()[untouched], x_SV[untouched])


@pytest.mark.parametrize("backend", BACKENDS)
def test_neutral_factors_change_nothing(backend: str) -> None:
    x_SV, states_NV, slots_S, _ = made_up(4, 50)
    got = x_SV.to(DEVICE)
    neutral_S3 = torch.tensor([[1.0, 0.0, 0.0]], device=DEVICE).repeat(4, 1)
    penalize(got, states_NV.to(DEVICE), slots_S.to(DEVICE), neutral_S3, backend=backend)
    assert torch.equal(got.cpu(), x_SV)


def test_what_does_not_fit_is_refused() -> None:
    x_SV, states_NV, slots_S, factors_S3 = made_up(4, 50)
    with pytest.raises(ValueError, match=r"logits \(4, 50\), states \(6, 49\)"):
        penalize(x_SV, states_NV[:, 1:], slots_S, factors_S3, backend="torch")
    with pytest.raises(ValueError, match=r"slots torch.int32"):
        penalize(x_SV, states_NV, slots_S.int(), factors_S3, backend="torch")
    with pytest.raises(ValueError, match="contiguous"):
        penalize(x_SV.t().contiguous().t(), states_NV, slots_S, factors_S3, backend="torch")
    with pytest.raises(ValueError, match="'cuda'"):
        penalize(x_SV, states_NV, slots_S, factors_S3, backend="cuda")
