"""Choosing kernels by measurement: every configuration of every way to fuse, checked and timed on the GPU at hand.

What is checked runs in a process of its own (`rd_deploy.helper`): a kernel that faults or hangs costs that process, and
is not used. Only what computed the right values there is timed here.
"""

import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np

from rd_deploy.chain import Chain
from rd_deploy.common import UserError, first_line
from rd_deploy.cuda.plan import Fusion, NothingToRun, Piece, Plan, build_plan, configs, places
from rd_deploy.cuda.trial import Choice, Trial, context_is_lost
from rd_deploy.helper import Helper, Lost, NotStarted
from rd_deploy.triton_kernels.cards import Card
from rd_deploy.triton_kernels.compile import Job, fill_cache
from rd_deploy.triton_kernels.launch import Launch, is_taken

COPIES = (20, 200)  # of weights, least and most
COLD = 1.5  # times the L2 cache: as many bytes of copies as surely drive each other out of it
STEADY_MS, SAMPLES = 5.0, 5  # of replays before those that count, and how many count
RISE_MS, PAUSE_S = 200.0, 0.5  # after a pause an idle card's clock, which can be a sixth of its highest, has to rise
QUEUED = 5  # replays of those before that keep the GPU busy while the first that counts is enqueued
PATIENCE = 60.0  # seconds for one kernel's trial, its reference included: one that takes longer hangs
LAUNCHES = 10  # of a trial
# Trials whose process is lost, each of which takes seconds, or a minute where it hangs: of a kernel, whose others are
# not tried then; and of a configuration of a kind of kernel, which is not tried for other shapes then.
MOST_LOST, MOST_LOST_OF_A_CONFIG = 3, 2

# Times and verdicts are a card's and a kernel's, whatever network asks: sessions of one process share them.
_times: dict[tuple, float] = {}
_reasons: dict[tuple, str | None] = {}  # why a choice must not be used; None: it was tried, and is right


class Tuner:
    """A stopwatch for `build_plan`. ``rejected``: configurations that did not compile, fit or compute what they should.

    Weights are taken in turn from so many copies that the L2 cache cannot hold them, because in a network they come
    from DRAM (unless 200 copies are too few); maps are those that the launch before has just used, as there.
    """

    def __init__(self, chain: Chain, batch: int, precision: str, card: Card, device):
        self.chain, self.batch, self.precision, self.card, self.device = chain, batch, precision, card, device
        self.rejected: list[str] = []
        on_gpu = str(device).startswith("cuda")  # the interpreter has no chance in it, and is slow
        self._trial = Trial(chain, batch, precision, str(device), LAUNCHES if on_gpu else 1)
        self._helper = Helper(self._trial, PATIENCE)
        self._lost: Counter[tuple] = Counter()

    def __enter__(self) -> "Tuner":
        self._helper.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._trial.forget()
        self._helper.__exit__(*error)

    def plan(self, fusion: Fusion = "auto") -> Plan:
        """The fastest plan for this card; a `UserError` names what was wrong where some place has no kernel left."""
        pieces = [piece for ways in places(self.chain, self.batch) for way in ways for piece in way]
        kernels = [kernel for kernel in dict.fromkeys(piece.kernel for piece in pieces) if is_taken(kernel)]
        choices = [Choice(kernel, config) for kernel in kernels for config in configs(kernel, self.card)]
        self._compile(choices)
        try:
            plan = build_plan(self.chain, self.batch, self.card, fusion, self)
        except NothingToRun as error:
            reasons = (f"{self._reason(c)}: {c.config}: " for c in choices if c.kernel == error.kernel)
            raise UserError(f"{next(reasons, '')}{error}") from error
        self._say(choices)
        self._trial.forget()
        return plan

    def overlaps(self, plan: Plan) -> bool:
        """Whether a plan's kernels are right where launches overlap (PDL); those that are not are ``rejected``."""
        choices = list(dict.fromkeys(Choice(step.piece.kernel, step.config, True) for step in plan.steps))
        self._compile(choices)
        reasons = [self._reason(choice) for choice in choices]
        self._say(choices)
        return not any(reasons)

    def __call__(self, piece: Piece, config: Any) -> float | None:
        choice = Choice(piece.kernel, config)
        key = self._key(choice)
        if key not in _times and self._reason(choice) is None:
            try:
                _times[key] = self._time(choice)
            except RuntimeError as error:  # no memory for copies, say
                _reasons[key] = first_line(error)
                if context_is_lost():  # the reason comes first: lines get cut
                    raise RuntimeError(f"{_reasons[key]}, which broke the GPU's context: {choice}") from error
        return None if self._reason(choice) else _times[key]

    def _key(self, choice: Choice) -> tuple:
        return choice, self.precision, self.card, str(self.device)

    def _compile(self, choices: list[Choice]) -> None:
        """In parallel what was not tried yet; what does not compile is not to be tried."""
        new = {
            Job(choice.kernel, choice.config, self.precision, self.card.capability, choice.pdl): choice
            for choice in choices
            if self._key(choice) not in _reasons
        }
        for job, reason in fill_cache(new):
            _reasons[self._key(new[job])] = reason

    def _say(self, choices: list[Choice]) -> None:
        found = [f"{reason}: {choice}" for choice in choices if (reason := self._known(choice))]
        self.rejected = list(dict.fromkeys(self.rejected + found))

    def _known(self, choice: Choice) -> str | None:
        """Why a choice must not be used, as far as that is known."""
        untried = None
        for lost, what, most in self._losses(choice):
            if self._lost[lost] >= most:
                untried = f"not tried, since {most} trials of {what} were lost"
        return _reasons.get(self._key(choice), untried)

    def _reason(self, choice: Choice) -> str | None:
        """The same, after a trial if there was none."""
        key = self._key(choice)
        if key not in _reasons and self._known(choice) is None:
            try:
                _reasons[key] = self._helper(choice)
            except Lost as reason:
                _reasons[key] = str(reason)
                self._lost.update(lost for lost, *_ in self._losses(choice))
            except NotStarted:
                raise
            except RuntimeError as error:  # of Triton, say: this choice alone is not to be used for it
                _reasons[key] = first_line(error)
        return self._known(choice)

    @staticmethod
    def _losses(choice: Choice) -> list[tuple]:
        """What a loss of this choice counts for: (key, in words, how often it may be lost)."""
        kind = type(choice.kernel)
        return [
            ((choice.kernel, choice.pdl), "this kernel", MOST_LOST),
            ((kind, choice.config, choice.pdl), f"this configuration of a {kind.__name__}", MOST_LOST_OF_A_CONFIG),
        ]

    def _time(self, choice: Choice) -> float:
        launch = choice.kernel.launch(choice.config)
        operands = self._trial.operands(choice, launch)
        return measure_cold(launch, operands, self._trial.weights, self.card)


def measure_cold(launch: Launch, operands: dict[str, Any], weights: list[str], card: Card) -> float:
    """Microseconds of a launch that finds its operands' maps where the last launch left them, but not its weights."""
    size = sum(operands[name].nbytes for name in weights)
    least, most = COPIES
    count = min(max(least, ceil(COLD * card.l2_bytes / size)), most) if size else 1
    copies = [operands | {name: operands[name].clone() for name in weights} for _ in range(count)]
    return measure(lambda index: launch.run(copies[index % count]), max(least, count))


def measure(enqueue: Callable[[int], None], repeats: int = COPIES[0]) -> float:
    """Microseconds of one ``enqueue(index)`` on the GPU: median of replays of a graph of ``repeats`` of them.

    Replays are queued one behind the other with events in between, so that the host's part of launching a graph hides
    behind the replay before, and begin when the clocks have had time to rise.
    """
    import torch

    graph = record(lambda: [enqueue(index) for index in range(repeats)])
    _warm_up(torch, graph)
    times = _elapsed(torch, graph, QUEUED + SAMPLES)[QUEUED:]
    return float(np.median(times)) * 1e3 / repeats


_busy = float("-inf")  # when the last measurement ended


def _warm_up(torch, graph) -> None:
    """Replay for a few milliseconds, or for longer after a pause."""
    global _busy
    least = RISE_MS if time.monotonic() - _busy > PAUSE_S else STEADY_MS
    end = time.monotonic() + least / 1e3
    while time.monotonic() < end:
        for _ in range(QUEUED):
            graph.replay()
        torch.cuda.synchronize()
    _busy = time.monotonic()


def _elapsed(torch, graph, replays: int) -> list[float]:
    """Milliseconds from replay to replay."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def record(calls: Callable[[], object]):
    """A CUDA graph of what ``calls`` enqueues, after one run of it outside."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph
