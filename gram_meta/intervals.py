"""Means over seeds, their intervals, and the harmonic mean."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean as mean
from statistics import stdev


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the half width of its 95 % interval (None: one seed, or no randomness)."""

    mean: float
    half_width: float | None
    seeds: int  # how many went in
    expected: int  # how many there should be


def harmonic(base: float, new: float) -> float:
    """Return H = 2 base new / (base + new); 0 if both are 0."""
    return 2 * base * new / (base + new) if base + new > 0 else 0.0


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Return half the interval of the mean, t(n-1) * s / sqrt(n); None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    from scipy.special import stdtrit  # Student's t quantile; scipy.stats takes a second to import

    return float(stdtrit(n - 1, 0.5 + confidence / 2)) * stdev(values) / math.sqrt(n)


def estimate(per_seed: Sequence[float], expected: int, fixed: bool = False) -> Estimate | None:
    """Return mean and interval of one value per seed; None without values. `fixed`: no randomness, so no interval."""
    if not per_seed:
        return None
    return Estimate(mean(per_seed), None if fixed else half_width(per_seed), len(per_seed), expected)


def harmonic_estimate(
    base: Mapping[int, float], new: Mapping[int, float], expected: int, fixed: bool = False
) -> Estimate | None:
    """Return H of the averaged base and new, over seeds with both; its interval is that of the seeds' own H."""
    both = [seed for seed in base if seed in new]
    if not both:
        return None
    of_means = harmonic(mean(base[seed] for seed in both), mean(new[seed] for seed in both))
    of_seeds = [harmonic(base[seed], new[seed]) for seed in both]
    return Estimate(of_means, None if fixed else half_width(of_seeds), len(both), expected)


def paired_difference(one: Mapping[int, float], reference: Mapping[int, float], expected: int) -> Estimate | None:
    """Return mean and interval of `one - reference`, seed by seed; None if they share no seed."""
    return estimate([one[seed] - reference[seed] for seed in one if seed in reference], expected)
