"""Statistics of paired timings: percentiles, and ratios with a bootstrap interval."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 4000
CHUNK = 4_000_000  # resampled values held at once
CONFIDENCE = 0.95
UNSTABLE_CV = 0.15
UNSTABLE_WIDTH = 0.10
EQUAL = 0.05  # ratios from 0.95 to 1.05 count as no difference
LEAST_P90, LEAST_P99 = 20, 100  # fewer calls have no such percentile: it would be the slowest call or close to it


@dataclass(frozen=True)
class Summary:
    """Of one callable, in ms: median of the samples with its bootstrap interval, percentiles of single calls (None: too
    few), coefficient of variation of the samples."""

    median: float
    low: float
    high: float
    p90: float | None
    p99: float | None
    cv: float


@dataclass(frozen=True)
class Ratio:
    """``b / a`` with a 95% interval: above 1, A is faster."""

    value: float
    low: float
    high: float

    @property
    def no_difference(self) -> bool:
        """True when the data show that the two are equal to 5%."""
        return difference(self.low, self.high) == "no difference"


def difference(low: float, high: float) -> str:
    """What an interval of a ratio says about equality, in words; empty when it shows a difference.

    "no difference" needs evidence, an interval within `EQUAL` of 1; a wider one that contains 1 only shows none.
    """
    if not low <= 1.0 <= high:
        return ""
    return "no difference" if low >= 1 - EQUAL and high <= 1 + EQUAL else "no difference shown"


def summarise(samples: list[float], calls: list[float], seed: int = 0) -> Summary:
    """The median of ``samples`` (two per quad, as the timer gives them), its interval, and their variation.

    Percentiles (linear interpolation) are of single ``calls``: a sample of a short network is a mean over many.
    """
    values = np.asarray(samples, np.float64)
    low, high = bootstrap_median(values.reshape(-1, 2), seed)
    return Summary(
        median=float(np.median(values)),
        low=low,
        high=high,
        p90=_percentile(calls, 90, LEAST_P90),
        p99=_percentile(calls, 99, LEAST_P99),
        cv=float(values.std(ddof=1) / values.mean()),
    )


def _percentile(calls: list[float], percent: int, least: int) -> float | None:
    return float(np.percentile(calls, percent)) if len(calls) >= least else None


def paired_ratio(a: list[float], b: list[float], seed: int = 0) -> Ratio:
    """Median over quads of (b1 + b2) / (a1 + a2), with its bootstrap interval.

    Within a quad A B B A a drift linear in time adds the same to both sums; the median over quads forgives outliers.
    """
    a_quads, b_quads = (np.asarray(samples, np.float64).reshape(-1, 2).sum(axis=1) for samples in (a, b))
    ratios = b_quads / a_quads
    low, high = bootstrap_median(ratios, seed)
    return Ratio(float(np.median(ratios)), low, high)


def bootstrap_median(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% interval of the median of all ``values``: expanded percentiles of a circular block bootstrap.

    Neighbouring quads resemble each other (clock speed, other load), so runs of about n^(1/3) quads are resampled
    together (Politis and Romano 1992): single ones would make the interval too narrow. The percentiles are expanded
    for few blocks (Hesterberg 2015, "What teachers should know about the bootstrap", section 3.3).
    ``values``: (n,) or (n, k), one row per quad, in time order; a quad's values stay together.
    """
    count = len(values)
    block = max(1, round(count ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(0, count, (RESAMPLES, -(-count // block)))
    chunks = np.array_split(starts, -(-RESAMPLES * values.size // CHUNK))
    medians = np.concatenate([_medians(values, chunk, block) for chunk in chunks])
    tail = _expanded_tail(max(2.0, count / block))
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(low), float(high)


def _medians(values: np.ndarray, starts: np.ndarray, block: int) -> np.ndarray:
    """Medians of resamples; ``starts``: (resamples, blocks), the first row of each block."""
    index = (starts[:, :, None] + np.arange(block)) % len(values)
    resamples = values[index.reshape(len(starts), -1)[:, : len(values)]]
    return np.median(resamples.reshape(len(starts), -1), axis=1)


def _expanded_tail(blocks: float) -> float:
    """Tail probability whose normal quantile is Student's for this many blocks, times sqrt(m / (m - 1))."""
    normal, freedom = NormalDist(), blocks - 1
    z = normal.inv_cdf((1 + CONFIDENCE) / 2)
    # Student's quantile by the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5).
    student = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    return normal.cdf(-student * (blocks / freedom) ** 0.5)


def instability(summaries: dict[str, Summary], ratio: Ratio) -> str | None:
    """A warning in words when samples vary or the interval is wide; None when the measurement is steady."""
    shaky = [f"{name} {summary.cv:.0%}" for name, summary in summaries.items() if summary.cv > UNSTABLE_CV]
    width = (ratio.high - ratio.low) / ratio.value
    parts = [f"coefficient of variation {', '.join(shaky)} (over {UNSTABLE_CV:.0%})"] if shaky else []
    parts += [f"ratio's interval {width:.0%} wide (over {UNSTABLE_WIDTH:.0%})"] if width > UNSTABLE_WIDTH else []
    return f"unstable: {'; '.join(parts)}: quiet the machine or raise --seconds" if parts else None
