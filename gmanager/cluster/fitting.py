"""Coefficients of what takes time, from measurements of which some are far off: non-negative, robust least squares.

    time = sum_f coefficient_f * feature_f

Errors count in proportion to the time: a step of a millisecond says as much as one of a second. What lies far from all
others (a step that the operating system held up) pulls with a bounded force at first (Huber's loss, by reweighting), and not at
all once it is known where the others lie (Tukey's biweight). What the measurements don't tell apart (the cost of a step from
that of its row, while every step has one row) stays in the proportions that were believed before.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ROUNDS = 12
"""Of reweighting, the last of them by Tukey's weights. 48 changed no coefficient by more than 0.001 % (300 steps, errors of
10 %, a fifth of the times ten times too long)."""
TUKEY_ROUNDS = 4
HUBER = 1.345
"""Errors beyond so many standard deviations pull no harder: 95 % efficient where all errors are normal (Huber, 1964)."""
TUKEY = 4.685
"""Errors beyond so many don't pull: likewise. With a fifth of all times ten times too long, the cost of a row that travels
varied by 1.7 % from one fit to another, and by Huber's weights alone by 4.4 %."""
LEAST_SPREAD = 0.01
"""Standard deviation of the relative errors that is taken for granted: clocks and kernels are no finer."""
TRUST = 1e-4
"""How strongly what was believed holds: a coefficient that doubles costs as much as one measurement that is off by 1 %."""
EVEN = 1e-9
"""Added to features of size 1 that may be multiples of each other."""

Floats = npt.NDArray[np.float64]


def fit(features: Sequence[Sequence[float]], times: Sequence[float], believed: Sequence[float]) -> list[float]:
    """The coefficients, as many as each measurement has features. `times`: above 0. `believed`: what was taken for true, at
    least 0, and one above 0. Raises ValueError if there are no measurements."""
    if not times:
        raise ValueError("there is nothing to fit")
    x_NF = np.asarray(features, dtype=np.float64)
    y_N = np.asarray(times, dtype=np.float64)
    prior_F, unit_F = _scaled(x_NF, y_N, np.asarray(believed, dtype=np.float64))
    z_NF, prior_F = x_NF * unit_F, prior_F / unit_F
    size_N, weight_N = y_N, np.ones_like(y_N)  # of times that are far too long, their own size makes little
    coefficients_F = prior_F
    for turn in range(ROUNDS):
        coefficients_F = _solve(z_NF / size_N[:, None], y_N / size_N, weight_N, prior_F)
        size_N = np.maximum(z_NF @ coefficients_F, y_N.min() * 1e-3)
        errors_N = np.abs(y_N / size_N - 1)
        errors_N /= max(1.4826 * float(np.median(errors_N)), LEAST_SPREAD)
        if turn < ROUNDS - 1 - TUKEY_ROUNDS:
            weight_N = np.minimum(1, HUBER / np.maximum(errors_N, HUBER))
        else:
            weight_N = np.maximum(0, 1 - (errors_N / TUKEY) ** 2) ** 2
    return [float(c) for c in coefficients_F * unit_F]


def _scaled(x_NF: Floats, y_N: Floats, believed_F: Floats) -> tuple[Floats, Floats]:
    """What was believed, for a machine that is as fast as the measurements say; and in which units to look for coefficients, so
    that all are of one size. One that is believed to be 0 may be a hundredth of what would explain all by itself."""
    predicted_N = x_NF @ believed_F
    seen = predicted_N > 0
    speed = float(np.median(y_N[seen] / predicted_N[seen])) if seen.any() else 1.0
    prior_F = believed_F * speed
    alone_F = float(np.median(y_N)) / np.maximum(x_NF.mean(axis=0), 1)
    return prior_F, np.maximum(prior_F, 0.01 * alone_F)


def _solve(z_NF: Floats, y_N: Floats, weight_N: Floats, prior_F: Floats) -> Floats:
    """Non-negative least squares, exactly: for each choice of coefficients that are 0 the others are solved for, all choices at
    once; the best one without a negative coefficient is the minimum. With five coefficients there are 32."""
    count = z_NF.shape[1]
    gram_FF = (z_NF * weight_N[:, None]).T @ z_NF + TRUST * np.eye(count)
    right_F = (z_NF * weight_N[:, None]).T @ y_N + TRUST * prior_F
    scale_F = 1 / np.sqrt(np.diag(gram_FF))  # so that none of the systems is singular, whatever the measurements
    scaled_FF = gram_FF * np.outer(scale_F, scale_F) + EVEN * np.eye(count)
    free_CF = (np.arange(2**count)[:, None] >> np.arange(count)) & 1 == 1
    both_CFF = free_CF[:, :, None] & free_CF[:, None, :]
    systems_CFF = np.where(both_CFF, scaled_FF, np.eye(count))
    found_CF = scale_F * np.linalg.solve(systems_CFF, np.where(free_CF, right_F * scale_F, 0)[:, :, None])[:, :, 0]
    loss_C = np.einsum("cf,fg,cg->c", found_CF, gram_FF, found_CF) - 2 * found_CF @ right_F
    loss_C[(found_CF < 0).any(axis=1)] = np.inf
    best_F: Floats = found_CF[int(np.argmin(loss_C))]
    return best_F
