"""Pooling on the GPU, in Triton's interpreter, against torch in float64."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernels import TYPES, error, run_guarded, with_guards

from rd_deploy.common import UserError
from rd_deploy.triton_kernels.cards import get_card
from rd_deploy.triton_kernels.pools import AveragePoolKernel, MaxPoolKernel

H100 = get_card("h100")
MAX = {
    "the stem's": MaxPoolKernel(2, 9, 11, 24, 3, 2, 1),
    "2x2": MaxPoolKernel(3, 6, 4, 16, 2, 2, 0),
    "stride 1": MaxPoolKernel(1, 5, 7, 3, 3, 1, 1),
    "one pixel": MaxPoolKernel(5, 1, 1, 8, 3, 2, 1),
    "many channels": MaxPoolKernel(1, 4, 4, 130, 3, 2, 1),
}
AVERAGE = {
    "7x7": AveragePoolKernel(2, 7, 7, 48),
    "one pixel": AveragePoolKernel(3, 1, 1, 20),
    "odd": AveragePoolKernel(1, 5, 9, 300),
}


def x_of(kernel, element):
    torch.manual_seed(0)
    return with_guards({"x": torch.randn(kernel.batch, kernel.height, kernel.width, kernel.channels)}, element)


@pytest.mark.parametrize("element", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", MAX)
def test_the_largest_of_each_window(name, element):
    """A maximum rounds nothing. All values are below zero in one image, so that padding of zeros would win."""
    kernel, operands = MAX[name], x_of(MAX[name], element)
    operands["x"][0] = -operands["x"][0].abs() - 1
    shape = (kernel.batch, *kernel.out_size, kernel.channels)
    for config in kernel.configs(H100):
        out = run_guarded(kernel, config, operands, shape)
        assert torch.equal(out, kernel.reference(operands["x"].float()).to(TYPES[element]))


@pytest.mark.parametrize(("element", "most"), [("fp32", 1e-6), ("fp16", 2**-11 + 1e-6), ("bf16", 2**-7)])
@pytest.mark.parametrize("name", AVERAGE)
def test_the_mean_of_all_pixels(name, element, most):
    kernel, operands = AVERAGE[name], x_of(AVERAGE[name], element)
    wanted = operands["x"].double().mean((1, 2), keepdim=True)
    for config in kernel.configs(H100):
        out = run_guarded(kernel, config, operands, (kernel.batch, 1, 1, kernel.channels))
        assert error(out, wanted) <= most


@pytest.mark.parametrize("kernel", [MAX["the stem's"], AVERAGE["7x7"]])
def test_what_is_not_a_number_stays_so(kernel):
    operands = x_of(kernel, "fp16")
    operands["x"][1, 2, 3, 5] = float("nan")
    height, width = getattr(kernel, "out_size", (1, 1))
    out = run_guarded(kernel, kernel.configs(H100)[0], operands, (kernel.batch, height, width, kernel.channels))
    assert out[1, :, :, 5].isnan().any()
    assert not out[0].isnan().any()
    assert not out[1, :, :, 4].isnan().any()


def test_too_large_a_map():
    for kernel in (MaxPoolKernel(2**20, 64, 64, 1, 3, 2, 1), AveragePoolKernel(2**20, 64, 64, 1)):
        with pytest.raises(UserError, match="smaller batch"):
            kernel.check()
