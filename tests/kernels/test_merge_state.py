"""Merging: splitting a set of tokens into any parts, in any order, equals the whole."""

from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import MergePlan, merge_states
from kernels.merge_state import apply_sinks
from kernels.reference import attention_state, compare, with_sinks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["torch", "triton"]


@settings(max_examples=25)
@given(
    backend=st.sampled_from(BACKENDS),
    rows_cuts=st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=1, max_size=6),
    heads=st.sampled_from([(4, 2), (9, 3), (8, 8)]),
    head_dim=st.sampled_from([16, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rng=st.randoms(use_true_random=False),
)
def test_parts_in_any_order_make_the_whole(
    backend: str,
    rows_cuts: list[list[int]],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    rng: Random,
) -> None:
    """Row t sees 40 tokens, cut at `rows_cuts[t]`; one cut is its own state, the others (empty ones too) are parts."""
    torch.manual_seed(rng.randrange(2**31))
    num_rows = len(rows_cuts)
    q = torch.randn(num_rows, heads[0], head_dim).to(dtype).double()
    k, v = torch.randn(2, 40, heads[1], head_dim).to(dtype).double()
    want_out, want_lse = attention_state(q, k, v, 0.4)
    out = torch.empty(want_out.shape, dtype=torch.float64)
    lse = torch.empty(want_lse.shape, dtype=torch.float64)
    parts: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    for row, cuts in enumerate(rows_cuts):
        bounds = [0, *sorted(cuts), 40]
        states = [attention_state(q[row : row + 1], k[a:b], v[a:b], 0.4) for a, b in pairwise(bounds)]
        rng.shuffle(states)
        out[row], lse[row] = states[0][0][0], states[0][1][0]
        parts += [(row, o[0], s[0]) for o, s in states[1:]]
    rng.shuffle(parts)
    plan = MergePlan.build([row for row, _, _ in parts], num_rows, device=DEVICE)
    got_out, got_lse = out.to(DEVICE, dtype), lse.to(DEVICE, torch.float32)
    part_out = torch.stack([o for _, o, _ in parts]) if parts else torch.empty(0, *out.shape[1:])
    part_lse = torch.stack([s for _, _, s in parts]) if parts else torch.empty(0, heads[0])
    merge_states(got_out, got_lse, part_out.to(DEVICE, dtype), part_lse.to(DEVICE).float(), plan, backend=backend)
    exact = dtype == torch.float32
    compare(got_out, want_out, rms=1e-6 if exact else 8e-3, max=1e-5 if exact else 5e-2)
    compare(got_lse, want_lse, rms=2e-6, max=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_states_stay_empty(backend: str) -> None:
    out, lse = torch.zeros(3, 4, 16, device=DEVICE), torch.full((3, 4), -torch.inf, device=DEVICE)
    out[2], lse[2] = 5.0, 1.0
    parts, part_lse = torch.zeros(4, 4, 16, device=DEVICE), torch.full((4, 4), -torch.inf, device=DEVICE)
    parts[3], part_lse[3] = 2.0, -3.0
    plan = MergePlan.build([0, 2, 0, 1], 3, device=DEVICE)
    merge_states(out, lse, parts, part_lse, plan, backend=backend)
    want = torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64)
    compare(out, want[:, None, None].expand(3, 4, 16), rms=0, max=0)
    want_lse = torch.tensor([-torch.inf, -3.0, 1.0], dtype=torch.float64)
    compare(lse, want_lse[:, None].expand(3, 4), rms=0, max=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_apart_states_do_not_overflow(backend: str) -> None:
    out, lse = torch.ones(1, 1, 16, device=DEVICE), torch.full((1, 1), -2e4, device=DEVICE)
    parts, part_lse = torch.full((1, 1, 16), 3.0, device=DEVICE), torch.full((1, 1), 2e4, device=DEVICE)
    merge_states(out, lse, parts, part_lse, MergePlan.build([0], 1, device=DEVICE), backend=backend)
    compare(out, torch.full((1, 1, 16), 3.0, dtype=torch.float64), rms=0, max=0)
    compare(lse, torch.full((1, 1), 2e4, dtype=torch.float64), rms=0, max=0)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="row 3, there are 3 rows"):
        MergePlan.build([0, 3], 3, device=DEVICE)
    plan = MergePlan.build([0, 1], 3, device=DEVICE)
    out, lse = torch.zeros(3, 4, 16, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="2 parts of 3 rows, got out"):
        merge_states(out, lse, out, lse, plan, backend="torch")
    with pytest.raises(ValueError, match="got 'auto'"):
        merge_states(out, lse, out[:2].clone(), lse[:2].clone(), plan, backend="auto")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "rms", "most"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 8e-3, 5e-2)])
def test_a_sink_is_one_more_logit_without_a_value(dtype: torch.dtype, rms: float, most: float, backend: str) -> None:
    """As a softmax over the scores and the sink, whose probability is dropped; a row that saw nothing stays 0."""
    torch.manual_seed(3)
    q = torch.randn(5, 6, 16).to(dtype)
    k, v = torch.randn(2, 11, 3, 16).to(dtype).double()
    sinks_H = torch.tensor([-50.0, -2.0, 0.0, 1.0, 3.0, 40.0]).to(dtype)
    lens_T = torch.tensor([0, 1, 4, 11, 11])
    out, lse = attention_state(q.double(), k, v, 0.3, lens_T)
    scores = torch.einsum("thd,shd->ths", q.double(), k.repeat_interleave(2, 1)) * 0.3
    scores = scores.masked_fill((torch.arange(11) >= lens_T[:, None])[:, None], -torch.inf)
    weights = torch.cat([scores, sinks_H.double().expand(5, -1).unsqueeze(-1)], -1).softmax(-1)[..., :-1]
    want = torch.einsum("ths,shd->thd", weights, v.repeat_interleave(2, 1))
    compare(with_sinks(out, lse, sinks_H), want, rms=1e-12, max=1e-11)
    got, got_lse = out.to(DEVICE, dtype), lse.to(DEVICE).float()
    apply_sinks(got, got_lse, sinks_H.to(DEVICE), backend=backend)
    compare(got, want, rms=rms, max=most)
    assert torch.equal(got_lse.cpu(), lse.float())


def test_sinks_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sinks \(5,\) don't fit"):
        apply_sinks(torch.zeros(2, 4, 16), torch.zeros(2, 4), torch.zeros(5), backend="torch")
