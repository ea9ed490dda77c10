"""Statistics of paired timings: percentiles, and ratios with a bootstrap interval."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 4000
CONFIDENCE = 0.95
UNSTABLE_CV = 0.15
UNSTABLE_WIDTH = 0.10


@dataclass(frozen=True)
class Summary:
    """Of one callable's samples, in ms: median with its bootstrap interval, percentiles, coefficient of variation."""

    median: float
    low: float
    high: float
    p90: float
    p99: float
    cv: float


@dataclass(frozen=True)
class Ratio:
    """``b / a`` with a 95% interval: above 1, A is faster."""

    value: float
    low: float
    high: float

    @property
    def no_difference(self) -> bool:
        """True when 1 lies inside the interval: the data cannot tell the two apart."""
        return self.low <= 1.0 <= self.high


def summarise(samples: list[float], seed: int = 0) -> Summary:
    """Percentiles (linear interpolation), the median's interval, and standard deviation over mean.

    ``samples``: two per quad, as the timer gives them.
    """
    values = np.asarray(samples, np.float64)
    quads = values.reshape(-1, 2).mean(axis=1)
    low, high = bootstrap_median(quads, seed)
    median = float(np.median(values))
    return Summary(
        median=median,
        low=min(low, median),
        high=max(high, median),
        p90=float(np.percentile(values, 90)),
        p99=float(np.percentile(values, 99)),
        cv=float(values.std(ddof=1) / values.mean()),
    )


def paired_ratio(a: list[float], b: list[float], seed: int = 0) -> Ratio:
    """Median over quads of (b1 + b2) / (a1 + a2), with its bootstrap interval.

    Within a quad A B B A a drift linear in time adds the same to both sums; the median over quads forgives outliers.
    """
    a_quads, b_quads = (np.asarray(samples, np.float64).reshape(-1, 2).sum(axis=1) for samples in (a, b))
    ratios = b_quads / a_quads
    low, high = bootstrap_median(ratios, seed)
    return Ratio(float(np.median(ratios)), low, high)


def bootstrap_median(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% interval of the median: expanded percentiles of a circular block bootstrap.

    Neighbouring quads resemble each other (clock speed, other load), so runs of about n^(1/3) quads are resampled
    together (Politis and Romano 1992): single ones would make the interval too narrow. The percentiles are expanded
    for few blocks (Hesterberg 2015, "What teachers should know about the bootstrap", section 3.3).
    ``values``: (n,), one per quad, in time order.
    """
    count = len(values)
    block = max(1, round(count ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(0, count, (RESAMPLES, -(-count // block)))
    index = (starts[:, :, None] + np.arange(block)) % count
    medians = np.median(values[index.reshape(RESAMPLES, -1)[:, :count]], axis=1)
    tail = _expanded_tail(max(2.0, count / block))
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(low), float(high)


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
