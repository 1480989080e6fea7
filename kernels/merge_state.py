"""Merging of partial attention states over disjoint sets of tokens.

For a row with states i (its own, and any number of parts):

    lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

The empty state is `out = 0, lse = -inf`; merging empty states gives the empty state. The order of the parts is free.

Sources: FlashAttention (section 3.1) for the algebra, DistAttention (Infinite-LLM, section 4) for merging partials of
several instances, FlashInfer (`merge_states`) for the operation.

Shape suffixes: T rows, H query heads, D head dim, M parts, T1 = T + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from kernels.upload import upload


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Which parts belong to which row, on the device; made once per step.

    Row t has the parts `part_index_M[row_offsets_T1[t] : row_offsets_T1[t + 1]]`.
    """

    row_offsets_T1: torch.Tensor
    part_index_M: torch.Tensor
    part_rows_M: torch.Tensor
    """The same the other way round: the row of each part."""

    @staticmethod
    def build(part_rows: Sequence[int], num_rows: int, *, device: torch.device) -> "MergePlan":
        """`part_rows[m]`: the row that part m belongs to, in any order; a row may have none or many.

        Raises:
            ValueError: for a row outside [0, num_rows).
        """
        counts = [0] * num_rows
        for row in part_rows:
            if not 0 <= row < num_rows:
                raise ValueError(f"a part belongs to row {row}, there are {num_rows} rows")
            counts[row] += 1
        offsets = [0, *accumulate(counts)]
        index = sorted(range(len(part_rows)), key=part_rows.__getitem__)
        table = upload([*offsets, *index, *part_rows], device)
        first, second = len(offsets), len(offsets) + len(index)
        return MergePlan(table[:first], table[first:second], table[second:])


def merge_states(
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
    parts_MHD: torch.Tensor,
    part_lse_MH: torch.Tensor,
    plan: MergePlan,
    *,
    backend: str,
) -> None:
    """Merge every part into the state of its row, in place; in fp32, rounded once to out's dtype. No host work.

    `lse` is natural-log fp32. The last dimension of `out` and `parts` must be contiguous. Backend "torch" or "triton".

    Raises:
        ValueError: shapes that contradict each other or the plan, or an unknown backend.
    """
    rows, parts = plan.row_offsets_T1.numel() - 1, plan.part_index_M.numel()
    if (
        out_THD.shape[0] != rows
        or parts_MHD.shape != (parts, *out_THD.shape[1:])
        or lse_TH.shape != out_THD.shape[:2]
        or part_lse_MH.shape != parts_MHD.shape[:2]
    ):
        raise ValueError(
            f"planned for {parts} parts of {rows} rows, got out {tuple(out_THD.shape)}, lse {tuple(lse_TH.shape)}, parts "
            f"{tuple(parts_MHD.shape)}, their lse {tuple(part_lse_MH.shape)}"
        )
    if not parts:
        return
    match backend:
        case "torch":
            _merge_states_torch(out_THD, lse_TH, parts_MHD, part_lse_MH, plan)
        case "triton":
            from kernels import triton_ops

            triton_ops.merge_states(out_THD, lse_TH, parts_MHD, part_lse_MH, plan.row_offsets_T1, plan.part_index_M)
        case _:
            raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def apply_sinks(out_THD: torch.Tensor, lse_TH: torch.Tensor, sinks_H: torch.Tensor, *, backend: str) -> None:
    """Let each row's softmax have one more logit, `sinks_H`, that stands for no value; in place, in fp32, rounded once.

        out = out exp(lse) / (exp(lse) + exp(sink)) = out sigmoid(lse - sink)

    For whole states, after the merge: a sink that each part had would count once for each of them. `lse` stays without it.

    The last dimension of `out` must be contiguous. Backend "torch" or "triton".

    Raises:
        ValueError: shapes that contradict each other, or an unknown backend.
    """
    if lse_TH.shape != out_THD.shape[:2] or sinks_H.shape != lse_TH.shape[1:]:
        raise ValueError(
            f"out {tuple(out_THD.shape)}, lse {tuple(lse_TH.shape)}, sinks {tuple(sinks_H.shape)} don't fit together"
        )
    match backend:
        case "torch":
            out_THD.mul_((lse_TH - sinks_H.float()).sigmoid().unsqueeze(-1))
        case "triton":
            from kernels import triton_ops

            triton_ops.apply_sinks(out_THD, lse_TH, sinks_H)
        case _:
            raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def _merge_states_torch(
    out_THD: torch.Tensor, lse_TH: torch.Tensor, parts_MHD: torch.Tensor, part_lse_MH: torch.Tensor, plan: MergePlan
) -> None:
    rows_M = plan.part_rows_M
    shift_TH = lse_TH.scatter_reduce(0, rows_M[:, None].expand_as(part_lse_MH), part_lse_MH, "amax")
    shift_TH.masked_fill_(shift_TH == -torch.inf, 0.0)  # exp(-inf - -inf) is NaN
    own_TH = (lse_TH - shift_TH).exp()
    part_MH = (part_lse_MH - shift_TH[rows_M]).exp()
    sum_TH = own_TH.index_add(0, rows_M, part_MH)

    merged_THD = out_THD.float() * own_TH[..., None]
    merged_THD.index_add_(0, rows_M, parts_MHD.float() * part_MH[..., None])
    merged_THD /= sum_TH.masked_fill(sum_TH == 0, 1.0)[..., None]
    out_THD.copy_(merged_THD)
    torch.add(shift_TH, sum_TH.log(), out=lse_TH)
