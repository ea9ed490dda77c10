"""The GPU's fused 1x1 convolution and global average pool, in Triton's interpreter, against torch in float64."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernels import checked_configs, error, run_guarded, with_guards

from rd_deploy.chain import Conv, GlobalAveragePool
from rd_deploy.common import UserError
from rd_deploy.triton_kernels.cards import CARDS
from rd_deploy.triton_kernels.expand_pool import ExpandPoolConfig, ExpandPoolKernel

# Of the largest output. Sums in fp32 up to the mean; then it is rounded to fp16's 11 bits, and in the interpreter cut
# to bf16's 8.
SUMS = 3e-6
TOLERANCES = {"fp32": SUMS, "fp16": SUMS + 2**-11, "bf16": SUMS + 2**-7}


def steps_of(kernel, seed=0):
    random = np.random.default_rng(seed)
    weight = random.standard_normal((kernel.outputs, kernel.inputs, 1, 1)) / kernel.inputs**0.5
    conv = Conv("expand", weight, random.standard_normal(kernel.outputs), 1, 0, True, "x")
    return conv, GlobalAveragePool("pool", "expand")


def operands_of(kernel, element="fp32", seed=0):
    """All operands but "out"; what lies beside an input is not a number, so that reading it would be seen."""
    torch.manual_seed(seed)
    operands = {"x": torch.randn(kernel.batch, kernel.height, kernel.width, kernel.inputs)}
    operands |= {name: torch.tensor(values) for name, values in kernel.weights(*steps_of(kernel, seed)).items()}
    return with_guards(operands, element)


def expected(kernel, operands):
    return kernel.reference(*(values.double() for values in operands.values()))


def run(kernel, config, operands):
    return run_guarded(kernel, config, operands, (kernel.batch, 1, 1, kernel.outputs))


def tile(images, pixels, block_n=16, block_k=16, stages=2):
    return ExpandPoolConfig(images, pixels, block_n, block_k, stages, 4)


CASES = {
    "one image in one tile": (ExpandPoolKernel(1, 7, 7, 32, 40), tile(1, 64, 32, 32)),
    "one image in groups": (ExpandPoolKernel(1, 7, 7, 64, 16), tile(1, 16)),
    "groups of 4": (ExpandPoolKernel(8, 7, 7, 32, 48), tile(8, 4, 32, 16, 3)),
    "groups of 8, ragged images": (ExpandPoolKernel(3, 7, 7, 32, 24), tile(2, 8)),
    "one pixel at a time": (ExpandPoolKernel(17, 2, 3, 32, 16), tile(16, 1)),
    "fewer images than a tile": (ExpandPoolKernel(2, 3, 3, 16, 16), tile(8, 2)),
    "groups fill": (ExpandPoolKernel(4, 4, 4, 32, 32), tile(2, 8)),
    "one step per group": (ExpandPoolKernel(2, 5, 3, 16, 32), tile(2, 8, 16, 16, 2)),
    "one pixel": (ExpandPoolKernel(5, 1, 1, 32, 17), tile(16, 1, 32)),
    "odd channels": (ExpandPoolKernel(2, 3, 4, 37, 21), tile(4, 4, 32, 32)),
    "few channels": (ExpandPoolKernel(2, 3, 4, 5, 3), tile(4, 4)),
    "wide map": (ExpandPoolKernel(1, 9, 14, 16, 16), tile(1, 32)),
}


HALF = ("one image in one tile", "groups of 8, ragged images", "odd channels")


@pytest.mark.parametrize(
    ("case", "element"),
    [*((case, "fp32") for case in CASES), *((case, element) for case in HALF for element in ("fp16", "bf16"))],
)
def test_matches_torch(case, element):
    kernel, config = CASES[case]
    operands = operands_of(kernel, element)
    assert error(run(kernel, config, operands), expected(kernel, operands)) <= TOLERANCES[element]


def test_reference_is_the_chains():
    kernel = CASES["odd channels"][0]
    conv, _ = steps_of(kernel)
    operands = operands_of(kernel)
    y = torch.einsum("nhwc,oc->nhwo", operands["x"].double(), torch.tensor(conv.weight[:, :, 0, 0]))
    y = (y + torch.tensor(conv.bias)).relu().mean(dim=(1, 2), keepdim=True)
    assert error(y, expected(kernel, operands)) <= SUMS


def test_control_other_weights_are_seen():
    kernel, config = ExpandPoolKernel(1, 5, 5, 64, 64), tile(1, 32)
    operands = operands_of(kernel)
    wrong = {**operands, "w": operands["w"].T.contiguous()}
    assert error(run(kernel, config, operands), expected(kernel, wrong)) > 0.1


def test_control_mean_and_relu_do_not_change_places():
    kernel, config = CASES["groups of 4"]
    operands = operands_of(kernel)
    x, w, b = (operands[name].double() for name in ("x", "w", "b"))
    wrong = (x.mean(dim=(1, 2), keepdim=True) @ w[:32, :48] + b[:48]).relu()
    assert error(run(kernel, config, operands), wrong) > 0.1


def test_nothing_is_rounded_before_the_mean():
    """An output of 1 + 2^-12 in every pixel would become 1 in fp16; with another pixel of 0 the mean shows it."""
    kernel, config = ExpandPoolKernel(1, 1, 2, 16, 16), tile(1, 16)
    operands = operands_of(kernel, "fp16")
    operands["x"].zero_()
    operands["w"].zero_()
    operands["x"][..., 0] = torch.tensor([2.0**-12, 2.0**-12 + 2.0**-10])
    operands["w"][0] = 1
    operands["b"].fill_(1)
    assert (run(kernel, config, operands).float() == 1 + 2**-10).all()


@pytest.mark.parametrize("case", ["groups of 8, ragged images", "one pixel at a time", "fewer images than a tile"])
def test_what_is_not_a_number_stays_in_its_image(case):
    kernel, config = CASES[case]
    operands = operands_of(kernel)
    operands["x"][1, 1, 1, 3] = float("nan")
    got = run(kernel, config, operands).isnan()
    assert got[1].all()
    assert got.sum() == kernel.outputs


def test_results_repeat():
    kernel, config = CASES["groups of 4"]
    operands = operands_of(kernel, "fp16")
    assert torch.equal(run(kernel, config, operands), run(kernel, config, operands))


@pytest.mark.parametrize(
    "kernel",
    [
        ExpandPoolKernel(2**14, 16, 16, 512, 16),
        ExpandPoolKernel(2**20, 1, 1, 16, 2048),
        ExpandPoolKernel(1, 1, 1, 2**16, 2**15),
    ],
)
def test_too_many_elements_are_refused(kernel):
    with pytest.raises(UserError, match="2\\^31"):
        kernel.check()


REAL = {
    "plain-50": ExpandPoolKernel(1, 7, 7, 512, 2048),
    "plain-50, batch 8": ExpandPoolKernel(8, 7, 7, 512, 2048),
    "plain-50, batch 32": ExpandPoolKernel(32, 7, 7, 512, 2048),
    "plain-50, batch 256": ExpandPoolKernel(256, 7, 7, 512, 2048),
    "other": ExpandPoolKernel(3, 2, 5, 40, 50),
    "small": ExpandPoolKernel(2, 1, 1, 8, 5),
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("name", REAL)
def test_configurations_fit_the_card(card, name):
    assert list(checked_configs(REAL[name], card))


@pytest.mark.parametrize("name", ["other", "small"])
def test_every_configuration_is_right(name):
    kernel = REAL[name]
    for config in kernel.configs(CARDS["h100"]):
        operands = operands_of(kernel)
        assert error(run(kernel, config, operands), expected(kernel, operands)) <= SUMS


def test_a_large_batch_wastes_little_and_one_image_fills_the_card():
    card = CARDS["h100"]
    one, many = (REAL[name].work(REAL[name].configs(card)[0]) for name in ("plain-50", "plain-50, batch 256"))
    assert many.issued_flops <= 1.15 * many.flops
    assert one.blocks >= 64


def test_work_counts_what_blocks_do():
    kernel = ExpandPoolKernel(3, 3, 4, 40, 24)
    work = kernel.work(ExpandPoolConfig(2, 8, 16, 32, 2, 4))  # 2 tiles of images, 2 of outputs; 2 groups, 2 steps each
    assert work.flops == 2 * 3 * 12 * 40 * 24
    assert work.blocks == 4
    assert work.issued_flops == 4 * 2 * 2 * (2 * 16 * 16 * 32)
    assert work.map_bytes == 2 * (3 * 12 * 40 + 3 * 24)
    assert work.weight_bytes == 2 * 40 * 32 + 4 * 32
    assert work.l2_bytes == 2 * 2 * 3 * 12 * 40 + 2 * 2 * 2 * 64 * 32 + 2 * 4 * 32 + 2 * 3 * 24
