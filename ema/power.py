"""Power-function EMA and its post-hoc reconstruction (EDM2 section 3, appendix C).

A power-function EMA of exponent gamma weighs the parameters of time tau up to time t in proportion to tau^gamma.
Its length is given as sigma_rel, the standard deviation of that profile relative to t. Profiles that were not
tracked are least-squares combinations of snapshots of profiles that were.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

STD_LIMIT = 12**-0.5  # sigma_rel of gamma = 0, a plain average of the whole run


def std_to_exp(std: float) -> float:
    """gamma of a length sigma_rel (EDM2 eq. 123): largest real root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2)."""
    assert 0 < std < STD_LIMIT, f'EMA length {std} outside (0, {STD_LIMIT:.4f})'
    t = std**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max())


def exp_to_std(exp: float) -> float:
    """Length sigma_rel of a gamma > 0 (EDM2 eq. 121): sqrt((g + 1) / ((g + 2)^2 (g + 3)))."""
    return math.sqrt((exp + 1) / ((exp + 2) ** 2 * (exp + 3)))


def ema_beta(std: float, t_next: float, t_delta: float) -> float:
    """Share of the old average kept in an update, exact for any interval (EDM2 eq. 127): (1 - t_delta/t_next)^(g + 1).

    Args:
        std: Length sigma_rel.
        t_next: Time after the update, > 0.
        t_delta: Time since the one before, 0 < t_delta <= t_next.
    """
    assert 0 < t_delta <= t_next
    return (1 - t_delta / t_next) ** (std_to_exp(std) + 1)


class PowerEMA:
    """Running power-function averages of a network's parameters, one for each length; buffers are copied.

    Args:
        tensors: Named parameters and buffers, for instance a state dict; the averages begin with their values.
        stds: Lengths sigma_rel.

    Attributes:
        averages: length -> name -> tensor. Plain tensors, so nothing can put them into training mode.
    """

    @torch.no_grad()
    def __init__(self, tensors: Mapping[str, torch.Tensor], stds: Sequence[float]):
        self.averages = {std: {name: t.detach().clone() for name, t in tensors.items()} for std in stds}

    @torch.no_grad()
    def update(self, tensors: Mapping[str, torch.Tensor], nimg: int, delta: int) -> None:
        """Average in the values that `tensors` have after `nimg` images, `delta` images after the last update."""
        for std, average in self.averages.items():
            weight = 1 - ema_beta(std, nimg, delta)
            torch._foreach_lerp_(list(average.values()), [tensors[name].detach() for name in average], weight)


def correlation(t_a: np.ndarray, exp_a: np.ndarray, t_b: np.ndarray, exp_b: np.ndarray) -> np.ndarray:
    """Inner product of two profiles (EDM2 eq. 149), elementwise over broadcast float64 arrays of times and gammas."""
    later = t_a > t_b
    t_a, t_b = np.where(later, t_b, t_a), np.where(later, t_a, t_b)
    exp_b_later = np.where(later, exp_a, exp_b)  # gamma of the profile that ends last
    return (exp_a + 1) * (exp_b + 1) * (t_a / t_b) ** exp_b_later / ((exp_a + exp_b + 1) * t_b)


def profile(t: np.ndarray, t_end: float, std: float) -> np.ndarray:
    """Weight that an average of length `std` at time `t_end` gives to time t (EDM2 eq. 124), which integrates to 1.

    Args:
        t: Times, float64.
        t_end: When the average was taken.
        std: Its length.
    """
    exp = std_to_exp(std)
    t = np.asarray(t, dtype=np.float64)
    return np.where(t <= t_end, (exp + 1) / t_end * (np.minimum(t, t_end) / t_end) ** exp, 0.0)


@dataclasses.dataclass(frozen=True)
class Combination:
    """How to combine snapshots into one profile.

    Args:
        coefficients: float64 [number of snapshots], summing to 1.
        error: L2 norm of the achieved minus the wanted profile, relative to the wanted one.
        amplification: Sum of absolute coefficients: how much rounding of the snapshots can grow.
    """

    coefficients: np.ndarray
    error: float
    amplification: float


def solve(in_t: Sequence[float], in_std: Sequence[float], out_t: float, out_std: float) -> Combination:
    """Least-squares combination of profiles for a wanted one (EDM2 algorithm 3, float64).

    Args:
        in_t, in_std: Times and lengths of the snapshots; times at most `out_t`.
        out_t, out_std: Time and length of the profile wanted.
    """
    t = np.asarray(in_t, dtype=np.float64)
    exps = np.array([std_to_exp(std) for std in in_std])
    assert t.shape == exps.shape and t.size and (t > 0).all() and (t <= out_t).all()
    exp = std_to_exp(out_std)
    A = correlation(t[:, None], exps[:, None], t[None], exps[None])
    b = correlation(t, exps, np.float64(out_t), np.float64(exp))
    x = np.linalg.lstsq(A, b, rcond=None)[0] if np.linalg.cond(A) > 1e14 else np.linalg.solve(A, b)
    if not x.any():  # the snapshots lie so far before a short profile that the correlations vanish: take the last one
        x[t.argmax()] = 1
    x = x / x.sum()
    norm2 = correlation(*(np.float64(v) for v in (out_t, exp, out_t, exp)))
    error2 = (x @ A @ x - 2 * x @ b + norm2) / norm2
    return Combination(x, math.sqrt(max(float(error2), 0)), float(np.abs(x).sum()))


def combine(tensors: Iterable[torch.Tensor], coefficients: Sequence[float]) -> torch.Tensor:
    """Weighted sum of one tensor over the snapshots, read one by one and accumulated in float64."""
    total = None
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        term = tensor.double() * float(coefficient)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total
