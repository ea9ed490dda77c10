"""How often rd-bench's 95% interval of a ratio covers the truth, in simulation.

    python benchmarks/check_intervals.py

Pairs of networks whose true ratio is 1.1; the noise of a quad is Gaussian (3%) with first-order autocorrelation rho.
Prints the share of intervals that hold the truth, for numbers of quads (rows) and rho (columns). About a minute.
"""

import numpy as np

from rd_deploy.bench.statistics import paired_ratio

TRUTH, NOISE, TRIALS = 1.1, 0.03, 300


def covered(quads: int, rho: float, generator: np.random.Generator) -> bool:
    """Whether one simulated measurement's interval holds the true ratio."""
    noise = np.empty(quads)
    noise[0] = generator.standard_normal()
    for number in range(1, quads):
        noise[number] = rho * noise[number - 1] + np.sqrt(1 - rho**2) * generator.standard_normal()
    slower = np.repeat(TRUTH * np.exp(NOISE * noise), 2)
    ratio = paired_ratio([1.0] * (2 * quads), slower.tolist(), seed=int(generator.integers(1 << 31)))
    return ratio.low <= TRUTH <= ratio.high


def main() -> None:
    """Simulate and print."""
    generator = np.random.default_rng(0)
    correlations = (0.0, 0.3, 0.6)
    print("quads " + " ".join(f"rho {rho:.1f}" for rho in correlations))
    for quads in (3, 10, 20, 40):
        shares = [np.mean([covered(quads, rho, generator) for _ in range(TRIALS)]) for rho in correlations]
        print(f"{quads:5d} " + " ".join(f"{share:7.0%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
