"""The GPU's fused stem (convolution, max-pool, 1x1), in Triton's interpreter, against torch in float64."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernels import checked_configs, error, run_guarded, with_guards

from rd_deploy.chain import Conv, MaxPool
from rd_deploy.common import UserError
from rd_deploy.triton_kernels.cards import CARDS
from rd_deploy.triton_kernels.stem import StemConfig, StemKernel

# Relative to the largest output. fp32: sums of up to 200 products, twice. Otherwise the output is rounded to fp16's 11
# bits, and in the interpreter cut to bf16's 8; with a second convolution so is its input, and these errors add up over
# at most 24 channels, with weights of 1/sqrt(24) on average, to no more than 24/sqrt(24) < 5 of them.
SUMS = 3e-6
TOLERANCES = {"fp32": SUMS, "fp16": SUMS + 2**-11, "bf16": SUMS + 2**-7}
TWICE = 6


def stem(batch, height, width, outputs=16, kernel=7, stride=2, padding=None, reduce=0, inputs=3):
    padding = kernel // 2 if padding is None else padding
    return StemKernel(batch, height, width, inputs, outputs, kernel, stride, padding, 3, 2, 1, reduce)


def steps_of(kernel, seed=0):
    random = np.random.default_rng(seed)
    shape = (kernel.outputs, kernel.inputs, kernel.kernel, kernel.kernel)
    weight = random.standard_normal(shape) / np.prod(shape[1:]) ** 0.5
    conv = Conv("conv", weight, random.standard_normal(kernel.outputs), kernel.stride, kernel.padding, True, "images")
    steps = [conv, MaxPool("pool", 3, 2, 1, "conv")]
    if kernel.reduce:
        weight = random.standard_normal((kernel.reduce, kernel.outputs, 1, 1)) / kernel.outputs**0.5
        steps.append(Conv("reduce", weight, random.standard_normal(kernel.reduce), 1, 0, True, "pool"))
    return steps


def operands_of(kernel, element="fp32", seed=0):
    """All operands but "out"; what lies beside an input is not a number, so that reading it would be seen."""
    torch.manual_seed(seed)
    packed = {name: torch.tensor(values) for name, values in kernel.weights(*steps_of(kernel, seed)).items()}
    operands = {"x": torch.randn(kernel.batch, kernel.height, kernel.width, kernel.inputs), **packed}
    return with_guards(operands, element)


def expected(kernel, operands):
    return kernel.reference(*(values.double() for values in operands.values()))


def run(kernel, config, operands):
    shape = (kernel.batch, *kernel.out_size, kernel.reduce or kernel.outputs)
    return run_guarded(kernel, config, operands, shape)


ONE_ROW, TWO_ROWS, THREE_ROWS = StemConfig(16, 1, 2, 4), StemConfig(16, 2, 1, 4), StemConfig(32, 3, 1, 4)
CASES = {
    "one strip": (stem(1, 12, 16), THREE_ROWS),
    "strips of one row": (stem(2, 16, 24), ONE_ROW),
    "last strip is shorter": (stem(1, 12, 12), TWO_ROWS),
    "images share blocks": (stem(5, 12, 12), TWO_ROWS),
    "several blocks": (stem(1, 8, 72, outputs=24), TWO_ROWS),
    "odd height": (stem(2, 21, 16), TWO_ROWS),
    "width by 2": (stem(1, 16, 18), THREE_ROWS),
    "odd width": (stem(2, 13, 11), TWO_ROWS),
    "odd map": (stem(1, 13, 12, kernel=3, padding=0), TWO_ROWS),
    "reduce": (stem(2, 16, 20, outputs=24, reduce=20), TWO_ROWS),
    "reduce to more": (stem(1, 12, 12, reduce=40), ONE_ROW),
    "reduce, odd": (stem(1, 11, 14, outputs=20, reduce=16), THREE_ROWS),
    "3x3": (stem(2, 9, 16, kernel=3), TWO_ROWS),
    "3x3, stride 1": (stem(1, 8, 8, kernel=3, stride=1), TWO_ROWS),
    "5x5, stride 3": (stem(1, 23, 20, kernel=5, stride=3, padding=1), TWO_ROWS),
    "1x1": (stem(1, 6, 8, kernel=1, stride=1), TWO_ROWS),
    "far padding": (stem(1, 8, 8, kernel=3, stride=2, padding=4), TWO_ROWS),
    "one channel": (stem(2, 16, 16, inputs=1), TWO_ROWS),
    "four channels": (stem(1, 12, 14, inputs=4), TWO_ROWS),
    "one pixel": (stem(1, 2, 2, kernel=3), ONE_ROW),
}


HALF = ("strips of one row", "odd width", "reduce to more")


@pytest.mark.parametrize(
    ("case", "element"),
    [*((case, "fp32") for case in CASES), *((case, element) for case in HALF for element in ("fp16", "bf16"))],
)
def test_matches_torch(case, element):
    kernel, config = CASES[case]
    operands = operands_of(kernel, element)
    tolerance = TOLERANCES[element] * (TWICE if kernel.reduce and element != "fp32" else 1)
    assert error(run(kernel, config, operands), expected(kernel, operands)) <= tolerance


@pytest.mark.parametrize("case", ["one strip", "odd width", "reduce", "3x3, stride 1"])
def test_reference_is_the_chains(case):
    kernel = CASES[case][0]
    conv, _, *reduce = steps_of(kernel)
    operands = operands_of(kernel)
    y = torch.nn.functional.conv2d(
        operands["x"].permute(0, 3, 1, 2), torch.tensor(conv.weight).float(), torch.tensor(conv.bias).float(),
        conv.stride, conv.padding,
    )  # fmt: skip
    y = torch.nn.functional.max_pool2d(y.relu(), 3, 2, 1)
    for step in reduce:
        y = torch.nn.functional.conv2d(y, torch.tensor(step.weight).float(), torch.tensor(step.bias).float()).relu()
    assert error(y.permute(0, 2, 3, 1), expected(kernel, operands)) <= SUMS


@pytest.mark.parametrize("case", ["one strip", "reduce to more"])
def test_control_a_transposed_kernel_is_seen(case):
    kernel, config = CASES[case]
    conv, *rest = steps_of(kernel)
    turned = dataclasses.replace(conv, weight=conv.weight.transpose(0, 1, 3, 2))
    operands = operands_of(kernel)
    wrong = {**operands, "w": torch.tensor(kernel.weights(turned, *rest)["w"])}
    assert error(run(kernel, config, operands), expected(kernel, wrong)) > 0.1


def test_control_the_middle_neighbours_weights_are_used():
    kernel, config = CASES["one strip"]
    operands = operands_of(kernel)
    right = run(kernel, config, operands)
    operands["w"][0] = 0
    assert error(run(kernel, config, operands), right.double()) > 0.1


def test_padding_never_wins():
    """Where the convolution gives negative numbers only, even with its bias, ReLU's zeros come out."""
    kernel, config = stem(1, 9, 9, kernel=3), TWO_ROWS
    operands = operands_of(kernel)
    operands["b"].fill_(-100)
    assert (run(kernel, config, operands) == 0).all()
    # Neither do rows and columns that the map does not have, where all products are zero and the bias remains.
    operands = operands_of(kernel)
    operands["x"].fill_(1)
    operands["w"].copy_(-operands["w"].abs())
    operands["b"].fill_(1)
    assert error(run(kernel, config, operands), expected(kernel, operands)) <= SUMS


@pytest.mark.parametrize("case", ["one strip", "odd width"])
def test_what_is_not_a_number_stays_so(case):
    kernel, config = CASES[case]
    operands = operands_of(kernel)
    operands["x"][0, 5, 6, 1] = float("nan")
    wanted = expected(kernel, operands).isnan()
    got = run(kernel, config, operands).isnan()
    assert wanted.any()
    assert not wanted.all()
    assert got[wanted].all()
    # It may get one pixel further to each side, since windows are loaded in parts, but not to other rows.
    assert not got[~wanted.any(dim=2, keepdim=True).expand_as(got)].any()


def test_weights_lie_where_each_neighbours_window_begins():
    kernel = stem(1, 224, 224, outputs=64, reduce=64)
    packed = kernel.weights(*steps_of(kernel))
    assert {name: values.shape for name, values in packed.items()} == {
        "w": (2, 6, 64, 32),
        "b": (64,),
        "w2": (64, 64),
        "b2": (64,),
    }
    conv = steps_of(kernel)[0]
    weight = conv.weight.astype(np.float32)
    w = packed["w"].reshape(2, 6, 64, 8, 4)
    assert np.array_equal(w[0, 0, :, :7, 3], weight[:, 0, :, 0])  # the middle one's begins 3 elements late
    assert np.array_equal(w[1, 0, :, :7, 1], weight[:, 0, :, 0])
    assert np.array_equal(w[1, 0, :, :7, 3], weight[:, 2, :, 0])
    assert np.count_nonzero(w) == 2 * weight.size


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (dataclasses.replace(stem(1, 8, 8), pool_kernel=2, pool_padding=0), "3x3 with stride 2"),
        (stem(1, 64, 64, kernel=3, reduce=256), "128 channels"),
        (stem(1, 32, 32, inputs=64), "shared memory"),
        (stem(16384, 224, 224), "2\\^31"),
    ],
)
def test_what_it_cannot_do_is_refused(kernel, words):
    with pytest.raises(UserError, match=words):
        kernel.check()


REAL = {
    "plain-50": stem(1, 224, 224, outputs=64, reduce=64),
    "plain-50, batch 32": stem(32, 224, 224, outputs=64, reduce=64),
    "plain-18": stem(1, 224, 224, outputs=64),
    "plain-18, batch 32": stem(32, 224, 224, outputs=64),
    "narrow": stem(4, 224, 224, outputs=16, reduce=16),
    "wide": stem(4, 160, 160, outputs=128, reduce=128, kernel=3),
    "odd width": stem(2, 225, 225, outputs=64, reduce=64),
    "tiny": stem(1, 8, 8, outputs=16),
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("name", REAL)
def test_configurations_fit_the_card(card, name):
    assert list(checked_configs(REAL[name], card))


def test_every_configuration_is_right():
    kernel = stem(1, 10, 12, kernel=3, reduce=16)
    for config in {config for card in ("h100", "l4") for config in kernel.configs(CARDS[card])[:4]}:
        operands = operands_of(kernel)
        assert error(run(kernel, config, operands), expected(kernel, operands)) <= SUMS


def test_work_counts_what_blocks_do():
    kernel = stem(2, 16, 12, outputs=20, reduce=24)  # map 8 x 6, pooled 4 x 3
    work = kernel.work(StemConfig(16, 3, 1, 4))
    pixels = 2 * 4 * 3
    assert work.flops == 2 * (2 * 8 * 6 * 147 * 20 + pixels * 20 * 24)
    assert work.blocks == 1  # 2 images x 2 strips x 3 columns
    assert work.issued_flops == 2 * 16 * (7 * 3 * 6 * 32 * 32 + 3 * 32 * 32)
    assert work.map_bytes == 2 * (2 * 16 * 12 * 3 + pixels * 24)
    weights = 2 * (2 * 6 * 32 * 32 + 32 * 32) + 4 * 64
    assert work.weight_bytes == weights
    assert work.l2_bytes == weights + 2 * (6 * 2 + 7) * (15 * 12 + 9 * 4) + 2 * pixels * 24


def test_batches_share_code():
    one, many = (REAL[name].launch(StemConfig(32, 4, 1, 4)) for name in ("plain-50", "plain-50, batch 32"))
    assert one.constants == many.constants
