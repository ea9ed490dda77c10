"""The tuner without a GPU: kernels are interpreted and times invented, so that what it does with them can be seen."""

from collections import Counter
from dataclasses import replace
from math import ceil

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from chains import bottlenecks

from rd_deploy.common import UserError
from rd_deploy.cuda import plan, trial, tune
from rd_deploy.cuda.trial import Choice, Trial
from rd_deploy.cuda.tune import Tuner
from rd_deploy.helper import Fatal, Helper, Lost, NotStarted
from rd_deploy.triton_kernels.bottleneck import BottleneckKernel
from rd_deploy.triton_kernels.cards import get_card
from rd_deploy.triton_kernels.conv import ConvKernel
from rd_deploy.triton_kernels.launch import Launch

CHAIN = bottlenecks(stages=(2,), size=(8, 8))


class Here:
    """In the place of a helper: the trial in this process, where what a test changes has an effect."""

    def __init__(self, function, patience):
        self.function = function

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __call__(self, choice):
        return self.function(choice)


def new(batch: int = 1) -> Tuner:
    return Tuner(CHAIN, batch, "fp16", get_card("h100"), torch.device("cpu"))


@pytest.fixture
def tuner(monkeypatch) -> Tuner:
    compiled = []
    monkeypatch.setattr(tune, "fill_cache", lambda jobs: compiled.extend(jobs) or [])
    monkeypatch.setattr(tune, "measure", lambda enqueue, repeats=20: enqueue(0) or 1.0)
    for module in (tune, plan):  # two configurations of each kernel, since interpreting them is slow
        monkeypatch.setattr(module, "configs", lambda kernel, card: kernel.configs(card)[:2])
    monkeypatch.setattr(tune, "_times", {})
    monkeypatch.setattr(tune, "_reasons", {})
    monkeypatch.setattr(tune, "Helper", Here)
    made = new()
    made.compiled = compiled
    return made


def is_bottleneck(choice: Choice) -> bool:
    return isinstance(choice.kernel, BottleneckKernel)


def fail(tuner: Tuner, error: Exception, where=is_bottleneck) -> list[Choice]:
    """Have the trials of some choices raise an error; those that did so far."""
    right, failed = tuner._helper.function, []

    def trial(choice):
        if where(choice):
            failed.append(choice)
            raise error
        return right(choice)

    tuner._helper.function = trial
    return failed


def test_right_kernels_pass_and_the_fewest_launches_win(tuner):
    chosen = tuner.plan()
    assert tuner.rejected == []
    assert "Bottleneck" in {step.kernel for step in chosen.steps}
    assert all(step.measured and step.us == 1.0 for step in chosen.steps)


def test_everything_timed_was_compiled_before(tuner):
    tuner.plan()
    assert {(job.kernel, job.config) for job in tuner.compiled} >= {
        (choice.kernel, choice.config) for choice, *_ in tune._times
    }
    assert {(job.element, job.capability) for job in tuner.compiled} == {("fp16", 90)}


def test_a_kernel_that_computes_something_else_is_not_used(tuner, monkeypatch):
    right = BottleneckKernel.reference
    monkeypatch.setattr(BottleneckKernel, "reference", lambda self, **operands: 1.1 * right(self, **operands))
    chosen = tuner.plan()
    assert "Bottleneck" not in {step.kernel for step in chosen.steps}
    assert tuner.rejected
    assert all("Bottleneck" in line and "wrong by 0.09" in line for line in tuner.rejected)


def test_a_kernel_that_does_not_fit_is_not_used(tuner, monkeypatch):
    from triton.runtime.errors import OutOfResources

    class TooLarge:
        def run(self, operands):
            raise OutOfResources(300_000, 232_448, "shared memory")

        tensors = property(lambda self: right(kernel, config).tensors)

    right = BottleneckKernel.launch
    kernel = config = None

    def launch(self, chosen, pdl=False):
        nonlocal kernel, config
        kernel, config = self, chosen
        return TooLarge()

    monkeypatch.setattr(BottleneckKernel, "launch", launch)
    chosen = tuner.plan()
    assert "Bottleneck" not in {step.kernel for step in chosen.steps}
    assert all("shared memory" in line for line in tuner.rejected)


def test_what_does_not_compile_is_not_run(tuner, monkeypatch):
    def fail(jobs):
        return [(job, "PassManager::run failed") for job in jobs if isinstance(job.kernel, BottleneckKernel)]

    monkeypatch.setattr(tune, "fill_cache", fail)
    monkeypatch.setattr(BottleneckKernel, "launch", None)  # a launch would fail the test
    chosen = tuner.plan()
    assert "Bottleneck" not in {step.kernel for step in chosen.steps}
    assert tuner.rejected
    assert all(line.startswith("PassManager::run failed: Bottleneck") for line in tuner.rejected)


def test_a_kernel_whose_trial_is_lost_is_not_used(tuner, monkeypatch):
    fail(tuner, Lost("its process ended with -6"))
    chosen = tuner.plan()
    assert "Bottleneck" not in {step.kernel for step in chosen.steps}
    assert tuner.rejected
    reasons = [line.split(": Bottleneck")[0] for line in tuner.rejected]
    assert set(reasons) == {"its process ended with -6"}  # two configurations of each


def test_a_kernel_that_is_lost_too_often_is_left(tuner, monkeypatch):
    for module in (tune, plan):
        monkeypatch.setattr(module, "configs", lambda kernel, card: kernel.configs(card)[:5])
    failed = fail(tuner, Lost("no answer within 60 s"))
    tuner.plan()
    assert set(Counter(choice.kernel for choice in failed).values()) == {tune.MOST_LOST}
    assert any(line.startswith("not tried, since 3 trials") for line in tuner.rejected)


def test_a_configuration_that_is_lost_for_some_shapes_is_not_tried_for_others(tuner):
    """A fault of all shapes must not cost a process for each, nor take the configurations along that are right."""

    def is_first(choice: Choice) -> bool:
        return choice.config == choice.kernel.configs(get_card("h100"))[0]

    failed = fail(tuner, Lost("no answer within 60 s"), is_first)
    chosen = tuner.plan()
    assert len(chosen.steps) > 0
    assert all(step.config != step.piece.kernel.configs(get_card("h100"))[0] for step in chosen.steps)
    lost = Counter((type(choice.kernel), choice.config) for choice in failed)
    assert max(lost.values()) <= tune.MOST_LOST_OF_A_CONFIG
    assert any(line.startswith("no answer within 60 s") for line in tuner.rejected)


def test_a_helper_that_cannot_be_started_ends_the_search(tuner):
    fail(tuner, NotStarted("a helping process did not start"), lambda choice: True)
    with pytest.raises(NotStarted):
        tuner.plan()


def test_a_trial_that_fails_otherwise_costs_its_choice_alone(tuner):
    fail(tuner, RuntimeError("AssertionError: of Triton\nat once"))
    chosen = tuner.plan()
    assert "Bottleneck" not in {step.kernel for step in chosen.steps}
    assert all(line.startswith("AssertionError: of Triton: Bottleneck") for line in tuner.rejected)


@pytest.mark.parametrize(("wrong_at", "found"), [(1, "wrong by "), (3, "launch 3 gives other bits"), (4, None)])
def test_a_launch_that_goes_wrong_by_chance_is_found(wrong_at, found):
    trial = Trial(CHAIN, 1, "fp16", "cpu", launches=3)
    kernel = next(piece.kernel for ways in plan.places(CHAIN, 1) for way in ways for piece in way)
    (choice, *_), count = [Choice(kernel, config) for config in kernel.configs(get_card("h100"))], Counter()

    class Fake:
        tensors = kernel.launch(choice.config).tensors

        def run(self, operands):
            count["launches"] += 1
            values = trial._inputs[2].to(operands["out"].dtype)
            operands["out"].copy_(values + (1.0 if count["launches"] == wrong_at else 0.0))

    class Faked(type(kernel)):
        def launch(self, config, pdl=False):
            return Fake()

    trial._inputs = (kernel, *trial._reference(kernel, kernel.launch(choice.config)))
    faked = object.__new__(Faked)
    faked.__dict__.update(vars(kernel))
    trial._inputs = (faked, *trial._inputs[1:])
    reason = trial(Choice(faked, choice.config))
    assert reason is None if found is None else found in reason


def test_a_fault_in_timing_is_named_first(tuner, monkeypatch):
    def fault(enqueue, repeats=20):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tune, "measure", fault)
    monkeypatch.setattr(tune, "context_is_lost", lambda: True)
    with pytest.raises(RuntimeError, match=r"^CUDA error: an illegal .* which broke the GPU's context: \w+Kernel\("):
        tuner.plan()


def test_a_place_without_any_kernel_says_why(tuner):
    tuner._helper.function = lambda choice: "CUDA error: device(s) is/are busy or unavailable"
    with pytest.raises(
        UserError, match=r"^CUDA error: device.*unavailable: \w+Config\(.*: no configuration of .* on h100"
    ):
        tuner.plan()


def test_what_a_network_has_wrong_is_said_as_it_is(tuner):
    def refuse(choice):
        raise UserError("stem: a weight reaches 1e+06, more than fp16 holds; use bf16")

    tuner._helper.function = refuse
    with pytest.raises(UserError, match=r"^stem: a weight"):
        tuner.plan()


def test_launches_overlap_only_where_every_kernel_is_right_so(tuner):
    right, tried = tuner._helper.function, []

    def only_plain(choice):
        tried.append(choice)
        return "wrong by 0.5 of the largest value" if choice.pdl else right(choice)

    tuner._helper.function = only_plain
    plan = tuner.plan()
    assert not any(choice.pdl for choice in tried)
    assert not tuner.overlaps(plan)
    assert {(choice.kernel, choice.config) for choice in tried if choice.pdl} == {
        (step.piece.kernel, step.config) for step in plan.steps
    }
    assert all("PDL" in line for line in tuner.rejected)
    assert {(job.kernel, job.config) for job in tuner.compiled if job.pdl} >= {
        (step.piece.kernel, step.config) for step in plan.steps
    }


def test_a_trial_in_a_process_of_its_own_says_the_same():
    """Kernel and chain are sent there; the interpreter computes."""
    here = Trial(CHAIN, 1, "fp16", "cpu")
    kernel = next(piece.kernel for ways in plan.places(CHAIN, 1) for piece in ways[-1])
    choice = Choice(kernel, kernel.configs(get_card("h100"))[0])
    with Helper(here, 60) as helper:
        assert helper(choice) is None
    assert here(choice) is None


def test_a_broken_context_is_fatal(monkeypatch):
    def fault(self, operands):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def broken():
        raise RuntimeError("again")

    kernel = next(piece.kernel for ways in plan.places(CHAIN, 1) for piece in ways[-1])
    choice = Choice(kernel, kernel.configs(get_card("h100"))[0])
    monkeypatch.setattr(Launch, "run", fault)
    assert Trial(CHAIN, 1, "fp16", "cpu")(choice) == "CUDA error: an illegal memory access was encountered"
    waits = iter([None])  # for the reference; the kernel then breaks it
    monkeypatch.setattr(trial, "wait", lambda: next(waits, broken) and broken())
    with pytest.raises(Fatal, match=r"^it broke the GPU's context: CUDA error: an illegal memory access"):
        Trial(CHAIN, 1, "fp16", "cpu")(choice)
    monkeypatch.setattr(trial, "wait", broken)
    with pytest.raises(Fatal, match=r"^its reference broke the GPU's context: again"):
        Trial(CHAIN, 1, "fp16", "cpu")(choice)


def test_a_kernel_is_timed_once_in_a_process(tuner, monkeypatch):
    tuner.plan()
    monkeypatch.setattr(tune, "measure", None)  # a second measurement would fail the test
    assert [step.us for step in new().plan().steps] == [step.us for step in tuner.plan().steps]
    with pytest.raises(TypeError):
        new(batch=2).plan()


def test_weights_are_other_memory_each_time_and_all_else_the_same(monkeypatch):
    """A convolution whose sum is split: scratch is shared, or the counters would never come round."""
    seen = []
    monkeypatch.setattr(tune, "measure", lambda enqueue, repeats: seen.append((enqueue, repeats)) or 1.0)
    kernel = ConvKernel(1, 14, 14, 256, 256, 3, 3, 1, 1, relu=True)
    card = get_card("h100")
    config = next(config for config in kernel.configs(card) if config.splits > 1)
    launch = kernel.launch(config)
    operands = {name: torch.zeros(100, dtype=torch.float16) for name in launch.tensors}
    used = []
    monkeypatch.setattr(Launch, "run", lambda self, given: used.append(given))
    tune.measure_cold(launch, operands, ["w", "b"], replace(card, l2_bytes=15_000))
    ((enqueue, repeats),) = seen
    for index in range(repeats):
        enqueue(index)
    assert repeats == ceil(tune.COLD * 15_000 / 400)
    for name in launch.tensors:
        assert len({given[name].data_ptr() for given in used}) == (repeats if name in ("w", "b") else 1), name


def test_outputs_of_zeros_are_right_when_zeros_are_wanted():
    here = Trial(CHAIN, 1, "fp16", "cpu")
    here._inputs = None, {}, torch.zeros(4)
    assert here._error(torch.zeros(4)) == 0
    assert here._error(torch.full((4,), 0.5)) == 0.5
    assert not here._error(torch.full((4,), float("nan"))) <= 1
