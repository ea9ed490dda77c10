"""The project's three claims, judged on what was measured: each verdict is a number, an interval and words."""

from dataclasses import asdict, dataclass

from rd_deploy.bench.statistics import difference
from rd_deploy.common import UserError, nearest

SPEED, MEMORY, SHARE = 1.4, 1.25, 0.40
SHARE_MARGIN = 0.05  # the paper says "about 40%": from 35% to 45% is read as that
GATES = {"speed": "speed/best/", "memory": "memory/in-place"}


@dataclass(frozen=True)
class Claim:
    """``holds``: True, False, or None when it is not decided or was not measured. Exact values have low = high."""

    name: str
    target: float
    value: float | None
    low: float | None
    high: float | None
    holds: bool | None
    text: str

    def to_dict(self) -> dict:
        return asdict(self)


def claim_name(kind: str, who: str, precision: str, batch: int) -> str:
    """``speed/torch/fp32/batch-1``"""
    return f"{kind}/{who}/{precision}/batch-{batch}"


def at_least(name: str, target: float, value: float, low: float, high: float, note: str = "") -> Claim:
    """Judge "at least ``target``": it holds when the whole interval reaches it, and fails when none of it does."""
    exact = low == high
    interval = "" if exact else f", 95% interval {low:.2f} to {high:.2f}"
    holds = True if low >= target else (False if high < target else None)
    if holds:
        words = f"holds ({value:.2f}x{interval})"
    elif holds is False:
        equal = difference(low, high)
        words = f"does not hold here{': ' if equal else ''}{equal} ({value:.2f}x{interval})"
    else:
        words = f"not decided ({value:.2f}x, the 95% interval {low:.2f} to {high:.2f} includes {target:g})"
    return Claim(name, target, value, low, high, holds, words + note)


def not_measured(name: str, target: float, reason: str) -> Claim:
    """A claim for which there is no figure; says why."""
    return Claim(name, target, None, None, None, None, f"not measured: {reason}")


def unjudged(claim: Claim, reason: str) -> Claim:
    """A claim about speed without its verdict, when too little was sampled for one; others stay."""
    if not claim.name.startswith("speed/") or claim.value is None:
        return claim
    return Claim(claim.name, claim.target, claim.value, None, None, None, f"not judged: {reason} ({claim.value:.2f}x)")


def share_claim(name: str, share: float) -> Claim:
    """Judge "shortcuts hold about 40% of the feature-map bytes": within `SHARE_MARGIN` of it."""
    holds = abs(share - SHARE) <= SHARE_MARGIN + 1e-12
    words = f"{'holds' if holds else 'does not hold here'} ({share:.0%}, counted, not measured)"
    return Claim(name, SHARE, share, share, share, holds, words)


def parse_requirements(texts: list[str]) -> dict[str, float]:
    """``["speed=1.4"]`` to ``{"speed": 1.4}``; anything malformed is a `UserError`."""
    requirements = {}
    for text in texts:
        name, equals, number = text.partition("=")
        if not equals:
            raise UserError(f"--require {text}: write NAME=NUMBER, such as speed=1.4 or memory=1.25")
        if name not in GATES:
            raise UserError(f"--require {text}: unknown claim '{name}'{nearest(name, GATES)}")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 < value < 1000:
            raise UserError(f"--require {text}: '{number}' is not a number between 0 and 1000")
        if name in requirements:
            raise UserError(f"--require {name} is given twice")
        requirements[name] = value
    return requirements


def unmet(requirements: dict[str, float], claims: list[dict]) -> list[str]:
    """The gate's failures in words; empty when every requirement is met.

    ``speed`` is required of every best-engine-against-best-engine ratio (each precision and batch measured), at the
    lower end of its interval; ``memory`` of the in-place ledger, the stricter policy. Nothing measured is a failure.
    """
    failures = []
    for gate, target in requirements.items():
        judged = [claim for claim in claims if claim["name"].startswith(GATES[gate])]
        if not judged:
            failures.append(f"{gate}={target:g} is not met: nothing was measured")
        for claim in judged:
            if claim["low"] is None:
                failures.append(f"{gate}={target:g} is not met: {claim['name']} {claim['text']}")
            elif claim["low"] < target:
                interval = (
                    ""
                    if claim["low"] == claim["high"]
                    else f" (95% interval {claim['low']:.2f} to {claim['high']:.2f})"
                )
                failures.append(f"{gate}={target:g} is not met: {claim['name']} is {claim['value']:.2f}x{interval}")
    return failures
