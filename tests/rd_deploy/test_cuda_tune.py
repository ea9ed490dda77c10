"""The tuner without a GPU: kernels are interpreted and times invented, so that what it does with them can be seen."""

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from chains import bottlenecks

from rd_deploy.cuda import tune
from rd_deploy.cuda.tune import Tuner
from rd_deploy.triton_kernels.bottleneck import BottleneckKernel
from rd_deploy.triton_kernels.cards import get_card

CHAIN = bottlenecks(stages=(2,), size=(8, 8))


@pytest.fixture
def tuner(monkeypatch) -> Tuner:
    compiled = []
    monkeypatch.setattr(tune, "fill_cache", lambda jobs: compiled.extend(jobs) or [])
    monkeypatch.setattr(tune, "measure", lambda enqueue, repeats=20, samples=5: enqueue(0) or 1.0)
    made = Tuner(CHAIN, 1, "fp16", get_card("h100"), torch.device("cpu"))
    made.compiled = compiled
    return made


def test_right_kernels_pass_and_the_fewest_launches_win(tuner):
    plan = tuner.plan()
    assert tuner.rejected == []
    assert "Bottleneck" in {step.kernel for step in plan.steps}
    assert all(step.measured and step.us == 1.0 for step in plan.steps)


def test_everything_timed_was_compiled_before(tuner):
    tuner.plan()
    assert {(job.kernel, job.config) for job in tuner.compiled} >= set(tuner._times)
    assert {(job.element, job.capability) for job in tuner.compiled} == {("fp16", 90)}


def test_a_kernel_that_computes_something_else_is_not_used(tuner, monkeypatch):
    right = BottleneckKernel.reference
    monkeypatch.setattr(BottleneckKernel, "reference", lambda self, **operands: 1.1 * right(self, **operands))
    plan = tuner.plan()
    assert "Bottleneck" not in {step.kernel for step in plan.steps}
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
    plan = tuner.plan()
    assert "Bottleneck" not in {step.kernel for step in plan.steps}
    assert all("shared memory" in line for line in tuner.rejected)


def test_weights_are_other_memory_each_time_and_maps_the_same(tuner, monkeypatch):
    seen = []

    def collect(enqueue, repeats=20, samples=5):
        seen.extend(cell.cell_contents for cell in enqueue.__closure__)
        return 1.0

    monkeypatch.setattr(tune, "measure", collect)
    tuner.plan()
    copies = next(value for value in seen if isinstance(value, list) and "w1" in value[0])
    assert len({given["w1"].data_ptr() for given in copies}) == tune.REPEATS
    assert len({given["x"].data_ptr() for given in copies}) == 1
    assert len({given["out"].data_ptr() for given in copies}) == 1
