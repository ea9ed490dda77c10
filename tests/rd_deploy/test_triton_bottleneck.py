"""The GPU's fused bottleneck, in Triton's interpreter, against torch in float64."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernels import checked_configs, error, run_guarded, with_guards

from rd_deploy.chain import Conv
from rd_deploy.common import UserError
from rd_deploy.triton_kernels.bottleneck import BottleneckConfig, BottleneckKernel
from rd_deploy.triton_kernels.cards import CARDS

SUMS = 3e-6  # of the largest output: sums in fp32
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-7}  # relative; the interpreter rounds to fp16 and cuts off to bf16

WIDTHS = [(64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
H100, OTHERS = CARDS["h100"], [CARDS[name] for name in ("a100", "l4", "b200", "rtx5090")]


def bottleneck(batch, height, width, channels, outputs, stride=1, hidden=None):
    return BottleneckKernel(batch, height, width, channels, hidden or 4 * channels, outputs, stride)


def step_of(random, inputs, outputs, kernel, stride=1):
    weight = random.standard_normal((outputs, inputs, kernel, kernel)) / (inputs * kernel**2) ** 0.5
    return Conv("conv", weight, random.standard_normal(outputs) / 2, stride, kernel // 2, True, "x")


def steps_of(kernel, seed=0):
    random = np.random.default_rng(seed)
    return (
        step_of(random, kernel.channels, kernel.channels, 3, kernel.stride),
        step_of(random, kernel.channels, kernel.hidden, 1),
        step_of(random, kernel.hidden, kernel.outputs, 1),
    )


def operands_of(kernel, element="fp32", seed=0):
    """All operands but "out"; what lies beside them is not a number, so that reading it would be seen."""
    torch.manual_seed(seed)
    operands = {"x": torch.randn(kernel.batch, kernel.height, kernel.width, kernel.channels)}
    operands |= {name: torch.tensor(values) for name, values in kernel.weights(*steps_of(kernel, seed)).items()}
    return with_guards(operands, element)


def expected(kernel, operands):
    return kernel.reference(**{name: values.double() for name, values in operands.items()})


def run(kernel, config, operands):
    return run_guarded(kernel, config, operands, (kernel.batch, *kernel.out_size, kernel.outputs))


def bound(kernel, operands, element):
    """Largest error per output when the narrow map, the wide map and the output are rounded, each sum exact."""
    rounding = ROUNDING[element]
    x, w1, b1, w2, b2, w3, b3 = (values.double() for values in operands.values())
    taps = w1.reshape(3, 3, kernel.channels, kernel.channels).permute(3, 2, 0, 1)
    t = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), taps, b1, kernel.stride, 1).relu().permute(0, 2, 3, 1)
    wide = (t @ w2 + b2).relu()
    t_error = rounding * t
    wide_error = rounding * (wide + t_error @ w2.abs()) + t_error @ w2.abs()
    sum_error = wide_error @ w3.abs()
    return rounding * ((wide @ w3 + b3).relu() + sum_error) + sum_error


CASES = {
    "ragged": (bottleneck(2, 7, 9, 64, 64), BottleneckConfig(64, 64, 64, 4, 3, 4)),
    "stride 2, odd": (bottleneck(3, 7, 5, 64, 128, 2), BottleneckConfig(64, 32, 32, 3, 2, 4, 0, 1)),
    "stride 2, even": (bottleneck(1, 8, 6, 128, 128, 2), BottleneckConfig(32, 64, 64, 3, 2, 2)),
    "one pixel": (bottleneck(1, 1, 1, 64, 64), BottleneckConfig(64, 32, 64, 3, 2, 4, 1, 1)),
    "one row": (bottleneck(2, 1, 9, 32, 64), BottleneckConfig(16, 32, 32, 3, 3, 1)),
    "one column": (bottleneck(2, 9, 1, 32, 16), BottleneckConfig(32, 16, 64, 3, 3, 2, 0)),
    "a tile exactly": (bottleneck(1, 8, 8, 16, 16), BottleneckConfig(64, 16, 16, 2, 2, 4)),
    "a tile of several images": (bottleneck(9, 3, 4, 128, 64), BottleneckConfig(128, 64, 32, 3, 2, 8)),
    "hidden 48": (bottleneck(2, 4, 5, 16, 32, hidden=48), BottleneckConfig(32, 16, 16, 3, 2, 2, 0, 1)),
    "hidden of one step": (bottleneck(1, 5, 5, 16, 32, hidden=16), BottleneckConfig(16, 16, 16, 3, 2, 1, 1, 1)),
    "256 to 512": (bottleneck(1, 5, 7, 256, 512, 2), BottleneckConfig(64, 64, 32, 3, 2, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_torch(case):
    kernel, config = CASES[case]
    operands = operands_of(kernel)
    assert error(run(kernel, config, operands), expected(kernel, operands)) <= SUMS


@pytest.mark.parametrize("element", ["fp16", "bf16"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "256 to 512"])  # the interpreter is slow
def test_half_precision_errs_by_its_roundings_only(case, element):
    kernel, config = CASES[case]
    operands = operands_of(kernel, element)
    wanted = expected(kernel, operands)
    wrong = (run(kernel, config, operands).double() - wanted).abs()
    assert (wrong <= bound(kernel, operands, element) + SUMS * wanted.max()).all()


@pytest.mark.parametrize("case", ["ragged", "stride 2, odd", "stride 2, even", "256 to 512"])
def test_control_transposed_taps_are_seen(case):
    kernel, config = CASES[case]
    operands = operands_of(kernel)
    taps = operands["w1"].view(3, 3, kernel.channels, kernel.channels)
    wrong = taps.transpose(0, 1).reshape(9, kernel.channels, kernel.channels)
    assert error(run(kernel, config, operands), expected(kernel, {**operands, "w1": wrong})) > 0.05


@pytest.mark.parametrize("case", ["ragged", "stride 2, odd"])
def test_control_half_precision_bounds_see_transposed_taps(case):
    kernel, config = CASES[case]
    operands = operands_of(kernel, "fp16")
    taps = operands["w1"].view(3, 3, kernel.channels, kernel.channels)
    wrong = {**operands, "w1": taps.transpose(0, 1).reshape(9, kernel.channels, kernel.channels)}
    difference = (run(kernel, config, operands).double() - expected(kernel, wrong)).abs()
    assert (difference > bound(kernel, operands, "fp16")).any()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "outputs"), WIDTHS)
def test_configurations_of_cards_are_right(channels, outputs, stride):
    """What is timed for real maps, on maps of a few pixels."""
    size = 56 * 64 // channels * stride
    real = bottleneck(32, size, size, channels, outputs, stride)
    options = {(config.block_m, config.l1, config.early): config for config in real.configs(H100)}
    options = list(options.values())[:: stride * channels // 64]
    configs = [*options, *(real.configs(card)[0] for card in OTHERS[stride - 1 :: 2])]
    kernel = bottleneck(2, 3, 5, channels, outputs, stride, hidden=128)
    operands = operands_of(kernel)
    wanted = expected(kernel, operands)
    for config in configs:
        assert error(run(kernel, config, operands), wanted) <= SUMS, config


@pytest.mark.parametrize("early", [0, 1])
def test_what_is_not_a_number_stays_so_where_it_reaches(early):
    kernel = bottleneck(1, 5, 5, 32, 16)
    operands = operands_of(kernel)
    operands["x"][0, 1, 1, 3] = float("nan")
    wanted = torch.zeros(1, 5, 5, 16, dtype=torch.bool)
    wanted[:, :3, :3] = True
    config = BottleneckConfig(16, 32, 32, 2, 2, 1, early=early)
    assert torch.equal(run(kernel, config, operands).isnan(), wanted)


def test_weights_are_packed_by_tap_input_and_output():
    kernel = bottleneck(1, 4, 4, 16, 32)
    conv, expand, reduce = steps_of(kernel)
    packed = kernel.weights(conv, expand, reduce)
    assert {name: values.shape for name, values in packed.items()} == {
        **{"w1": (9, 16, 16), "b1": (16,), "w2": (16, 64), "b2": (64,), "w3": (64, 32), "b3": (32,)}
    }
    assert all(values.dtype == np.float32 and values.flags.c_contiguous for values in packed.values())
    assert packed["w1"][3 * 2 + 1, 5, 7] == np.float32(conv.weight[7, 5, 2, 1])
    assert packed["w2"][5, 40] == np.float32(expand.weight[40, 5, 0, 0])
    assert packed["w3"][40, 5] == np.float32(reduce.weight[5, 40, 0, 0])


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        (bottleneck(1, 4, 4, 48, 64), "48 channels"),
        (bottleneck(1, 4, 4, 8, 64), "8 channels"),
        (bottleneck(1, 4, 4, 512, 512), "512 channels"),
        (bottleneck(1, 4, 4, 64, 96), "96 outputs"),
        (bottleneck(1, 4, 4, 64, 1024), "1024 outputs"),
        (bottleneck(1, 4, 4, 64, 64, hidden=72), "72 hidden"),
        (bottleneck(12000, 56, 56, 64, 64), "2\\^31"),
    ],
)
def test_other_shapes_are_refused(kernel, what):
    with pytest.raises(UserError, match=what):
        kernel.check()


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("channels", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("outputs", [16, 32, 64, 128, 256, 512])
def test_configurations_fit_the_card(card, channels, outputs):
    for batch in (1, 32):
        kernel = bottleneck(batch, 14, 14, channels, outputs)
        for config, _, _ in checked_configs(kernel, card):
            assert channels % config.block_k == kernel.hidden % config.block_h == 0


def test_hidden_channels_that_only_16_divides_have_configurations():
    assert all(config.block_h == 16 for config in bottleneck(1, 8, 8, 16, 16, hidden=48).configs(H100))


def test_work_counts_what_blocks_do():
    kernel = bottleneck(2, 5, 4, 64, 128, 2)  # 3 x 2 outputs an image, 12 pixels
    inside = [(r * 2 - 1 + i, c * 2 - 1 + j) for r in range(3) for c in range(2) for i in range(3) for j in range(3)]
    inside = [(row, column) for row, column in inside if 0 <= row < 5 and 0 <= column < 4]
    weights = 9 * 64 * 64 + 64 * 256 + 256 * 128
    weight_bytes = 2 * weights + 4 * (64 + 256 + 128)
    for l1, touched in ((0, len(inside)), (1, len(set(inside)))):
        work = kernel.work(BottleneckConfig(64, 64, 64, 4, 3, 4, l1))
        assert work.flops == 2 * 12 * weights
        assert work.issued_flops == 2 * 64 * weights
        assert work.map_bytes == 2 * (2 * 5 * 4 * 64 + 12 * 128)
        assert work.weight_bytes == weight_bytes
        assert work.l2_bytes == 2 * 2 * touched * 64 + weight_bytes + 2 * 12 * 128
        assert work.blocks == 1
    assert kernel.work(BottleneckConfig(64, 64, 64, 4, 3, 8)).issued_flops == 2 * 64 * (weights + 64 * 256)
