"""The tuner without a GPU: kernels are interpreted and times invented, so that what it does with them can be seen."""

from dataclasses import replace
from math import ceil

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from chains import bottlenecks

from rd_deploy.cuda import plan, tune
from rd_deploy.cuda.tune import Tuner
from rd_deploy.triton_kernels.bottleneck import BottleneckKernel
from rd_deploy.triton_kernels.cards import get_card
from rd_deploy.triton_kernels.conv import ConvKernel
from rd_deploy.triton_kernels.launch import Launch

CHAIN = bottlenecks(stages=(2,), size=(8, 8))


@pytest.fixture
def tuner(monkeypatch) -> Tuner:
    compiled = []
    monkeypatch.setattr(tune, "fill_cache", lambda jobs: compiled.extend(jobs) or [])
    monkeypatch.setattr(tune, "measure", lambda enqueue, repeats=20: enqueue(0) or 1.0)
    for module in (tune, plan):  # two configurations of each kernel, since interpreting them is slow
        monkeypatch.setattr(module, "configs", lambda kernel, card: kernel.configs(card)[:2])
    monkeypatch.setattr(tune, "_times", {})
    monkeypatch.setattr(tune, "_reasons", {})
    made = Tuner(CHAIN, 1, "fp16", get_card("h100"), torch.device("cpu"))
    made.compiled = compiled
    return made


def test_right_kernels_pass_and_the_fewest_launches_win(tuner):
    chosen = tuner.plan()
    assert tuner.rejected == []
    assert "Bottleneck" in {step.kernel for step in chosen.steps}
    assert all(step.measured and step.us == 1.0 for step in chosen.steps)


def test_everything_timed_was_compiled_before(tuner):
    tuner.plan()
    assert {(job.kernel, job.config) for job in tuner.compiled} >= {key[:2] for key in tune._times}
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
    assert all(line.endswith("PassManager::run failed") for line in tuner.rejected)


def test_a_kernel_is_timed_once_in_a_process(tuner, monkeypatch):
    tuner.plan()
    monkeypatch.setattr(tune, "measure", None)  # a second measurement would fail the test
    again = Tuner(CHAIN, 1, "fp16", get_card("h100"), torch.device("cpu"))
    assert [step.us for step in again.plan().steps] == [step.us for step in tuner.plan().steps]
    with pytest.raises(TypeError):
        Tuner(CHAIN, 2, "fp16", get_card("h100"), torch.device("cpu")).plan()


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


def test_outputs_of_zeros_are_right_when_zeros_are_wanted(tuner):
    tuner._inputs = None, {}, torch.zeros(4)
    assert tuner._error(torch.zeros(4)) == 0
    assert tuner._error(torch.full((4,), 0.5)) == 0.5
    assert not tuner._error(torch.full((4,), float("nan"))) <= 1
