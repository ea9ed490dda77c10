"""The GPU's convolution, in Triton's interpreter, against torch in float64."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernels import TYPES, checked_configs, error, run_guarded, with_guards

from rd_deploy.chain import Conv, Linear
from rd_deploy.common import UserError
from rd_deploy.triton_kernels.cards import CARDS
from rd_deploy.triton_kernels.conv import ConvKernel
from rd_deploy.triton_kernels.conv_tiles import ConvConfig

# Of the largest output. Sums in fp32 of up to 2048 products; then the output is rounded to fp16's 11 bits, and in the
# interpreter cut to bf16's 8.
SUMS = 3e-6
TOLERANCES = {"fp32": SUMS, "fp16": SUMS + 2**-11, "bf16": SUMS + 2**-7}


def conv(batch, height, width, inputs, outputs, kernel=3, stride=1, padding=None, **options):
    """A `ConvKernel`; ``kernel``: a size or (height, width)."""
    kernel_height, kernel_width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = kernel_width // 2 if padding is None else padding
    return ConvKernel(
        *(batch, height, width, inputs, outputs, kernel_height, kernel_width, stride, padding),
        **{"relu": True, **options},
    )


def step_of(kernel, seed=0):
    random = np.random.default_rng(seed)
    shape = (kernel.outputs, kernel.inputs, kernel.kernel_height, kernel.kernel_width)
    weight = random.standard_normal(shape) / kernel.depth**0.5
    return Conv("conv", weight, random.standard_normal(kernel.outputs), kernel.stride, kernel.padding, kernel.relu, "x")


def operands_of(kernel, config, element="fp32", seed=0):
    """All operands but "out"; what lies beside an input is not a number, so that reading it would be seen."""
    torch.manual_seed(seed)
    operands = {"x": torch.randn(kernel.batch, kernel.height, kernel.width, kernel.inputs)}
    operands |= {name: torch.tensor(values) for name, values in kernel.weights(step_of(kernel, seed)).items()}
    if kernel.add:
        operands["add"] = torch.randn(kernel.batch, *kernel.out_size, kernel.outputs)
    operands = with_guards(operands, element)
    for name, (kind, elements) in kernel.scratch(config).items():
        operands[name] = torch.zeros(elements, dtype=TYPES[kind])
    return operands


def expected(kernel, operands):
    names = ("x", "w", "b", "add") if kernel.add else ("x", "w", "b")
    return kernel.reference(*(operands[name].double() for name in names))


def run(kernel, config, operands):
    shape = (kernel.batch, *kernel.out_size, kernel.outputs)
    return run_guarded(kernel, config, operands, shape, torch.float32 if kernel.fp32_out else None)


SMALL = ConvConfig(16, 16, 16, 2, 4)
CASES = {
    "3x3": (conv(2, 7, 9, 32, 24), ConvConfig(32, 32, 32, 3, 4)),
    "3x3, one step per tap": (conv(1, 5, 5, 16, 16), SMALL),
    "3x3, stride 2": (conv(3, 7, 6, 32, 32, stride=2), ConvConfig(64, 16, 16, 3, 4)),
    "3x3, no padding": (conv(2, 6, 5, 16, 40, padding=0), ConvConfig(16, 32, 16, 3, 4)),
    "5x3, far padding": (conv(1, 3, 5, 32, 17, kernel=(5, 3), padding=3), ConvConfig(32, 16, 32, 3, 4)),
    "2x2, stride 3": (conv(2, 7, 7, 16, 16, kernel=2, stride=3, padding=0), SMALL),
    "one pixel": (conv(1, 1, 1, 64, 64), ConvConfig(16, 32, 64, 3, 4)),
    "1x1": (conv(2, 5, 6, 64, 70, kernel=1), ConvConfig(32, 64, 64, 2, 4)),
    "1x1, stride 2": (conv(2, 5, 7, 48, 48, kernel=1, stride=2), ConvConfig(16, 32, 16, 2, 4)),
    "1x1, padding": (conv(1, 3, 3, 16, 16, kernel=1, padding=1), SMALL),
    "1x1, add": (conv(2, 7, 7, 64, 128, kernel=1, add=True), ConvConfig(64, 64, 32, 3, 4)),
    "add without ReLU": (conv(1, 4, 4, 32, 20, add=True, relu=False), ConvConfig(16, 32, 32, 3, 4)),
    "linear": (conv(5, 1, 1, 64, 10, kernel=1, relu=False, fp32_out=True), ConvConfig(16, 16, 64, 2, 4)),
    "gather: images": (conv(1, 18, 17, 3, 24, kernel=7, stride=2), ConvConfig(32, 32, 32, 3, 4)),
    "gather: 24 channels": (conv(2, 5, 4, 24, 16), ConvConfig(16, 16, 64, 3, 4)),
    "gather: 1x1, 5 channels": (conv(2, 3, 3, 5, 7, kernel=1), ConvConfig(16, 16, 32, 2, 4)),
    "split": (conv(1, 5, 7, 64, 40), ConvConfig(32, 32, 32, 3, 4, splits=3)),
    "split unevenly": (conv(1, 4, 5, 32, 40, add=True), ConvConfig(16, 32, 32, 2, 4, splits=4)),
    "split, one step each": (conv(2, 3, 3, 128, 32, kernel=1), ConvConfig(32, 16, 16, 2, 4, splits=8)),
    "split, linear": (conv(3, 1, 1, 256, 10, kernel=1, relu=False, fp32_out=True), ConvConfig(16, 16, 64, 2, 4, 4)),
    "split, gather": (conv(1, 9, 9, 3, 16, kernel=7, stride=2), ConvConfig(16, 16, 32, 2, 4, splits=5)),
    "split in more than there are": (conv(1, 3, 3, 16, 16), ConvConfig(16, 16, 16, 2, 4, splits=7)),
}


@pytest.mark.parametrize("element", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_matches_torch(case, element):
    kernel, config = CASES[case]
    operands = operands_of(kernel, config, element)
    tolerance = SUMS if kernel.fp32_out else TOLERANCES[element]
    assert error(run(kernel, config, operands), expected(kernel, operands)) <= tolerance


@pytest.mark.parametrize("case", ["3x3", "5x3, far padding", "gather: images", "split"])
def test_control_transposed_taps_are_seen(case):
    kernel, config = CASES[case]
    operands = operands_of(kernel, config)
    taps = operands["w"][: kernel.depth].view(kernel.kernel_height, kernel.kernel_width, kernel.inputs, -1)
    wrong = operands["w"].clone()
    turned = taps.flip(0, 1) if kernel.kernel_height != kernel.kernel_width else taps.transpose(0, 1)
    wrong[: kernel.depth] = turned.reshape(kernel.depth, -1)
    assert error(run(kernel, config, operands), expected(kernel, {**operands, "w": wrong})) > 0.1


@pytest.mark.parametrize("case", ["split", "split unevenly", "split, gather"])
def test_splits_leave_their_counters_ready_for_the_next_run(case):
    kernel, config = CASES[case]
    operands = operands_of(kernel, config)
    first = run(kernel, config, operands)
    assert (operands["arrivals"] == 0).all()
    operands["partials"].fill_(float("nan"))  # whatever an earlier run left there
    assert torch.equal(run(kernel, config, operands), first)


@pytest.mark.parametrize("splits", [1, 3])
def test_output_may_be_what_is_added(splits):
    kernel = conv(2, 5, 5, 32, 40, add=True)
    config = ConvConfig(16, 32, 32, 2, 4, splits)
    operands = operands_of(kernel, config, "fp16")
    apart = run(kernel, config, operands)
    kernel.launch(config).run({**operands, "out": operands["add"]})
    assert torch.equal(operands["add"], apart)


@pytest.mark.parametrize("splits", [1, 3])
def test_what_is_not_a_number_stays_so_where_it_reaches(splits):
    kernel = conv(1, 5, 5, 32, 16)
    config = ConvConfig(16, 16, 32, 2, 4, splits)
    operands = operands_of(kernel, config)
    operands["x"][0, 1, 1, 3] = float("nan")
    wanted = torch.zeros(1, 5, 5, 16, dtype=torch.bool)
    wanted[:, :3, :3] = True
    assert torch.equal(run(kernel, config, operands).isnan(), wanted)


def test_weights_of_a_linear_layer():
    weight = np.arange(40.0).reshape(10, 4)
    kernel = conv(1, 1, 1, 4, 10, kernel=1, relu=False, fp32_out=True)
    packed = kernel.weights(Linear("fc", weight, np.arange(10.0), "x"))
    assert packed["w"].shape == (64, 16)
    assert packed["w"].dtype == packed["b"].dtype == np.float32
    assert np.array_equal(packed["w"][:4, :10], weight.T)
    assert np.array_equal(packed["b"], [*range(10), *[0] * 6])
    assert packed["w"].sum() == weight.sum()


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        (conv(1024, 224, 224, 64, 1), "input"),
        (conv(1024, 56, 56, 16, 1024), "output"),
        (conv(1, 1, 1, 2**16, 2**12), "weight"),
    ],
)
def test_too_many_elements_are_refused(kernel, what):
    with pytest.raises(UserError, match=f"its {what} has 2\\^31"):
        kernel.check()


REAL = {
    "stem": conv(1, 224, 224, 3, 64, kernel=7, stride=2),
    "stage 1": conv(32, 56, 56, 64, 64),
    "stage 3": conv(1, 14, 14, 256, 256),
    "stage 3, batch 32": conv(32, 14, 14, 256, 256),
    "expand 4": conv(1, 7, 7, 512, 2048, kernel=1, add=True),
    "fc": conv(1, 1, 1, 2048, 1000, kernel=1, relu=False, fp32_out=True),
    "digits": conv(1, 8, 8, 16, 16),
    "ten classes": conv(4, 1, 1, 64, 10, kernel=1, relu=False, fp32_out=True),
    "24 channels": conv(1, 7, 7, 24, 24, stride=2),
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("name", REAL)
def test_configurations_fit_the_card(card, name):
    kernel = REAL[name]
    for config, _, _ in checked_configs(kernel, card):
        assert kernel.gather or kernel.inputs % config.block_k == 0
        assert (config.splits - 1) * np.ceil(
            np.ceil(kernel.depth / config.block_k) / config.splits
        ) * config.block_k < kernel.depth


def test_a_small_map_is_split_and_a_large_one_is_not():
    assert any(config.splits > 1 for config in REAL["stage 3"].configs(CARDS["h100"]))
    assert all(config.splits == 1 for config in REAL["stage 3, batch 32"].configs(CARDS["h100"]))


@pytest.mark.parametrize("name", ["digits", "ten classes", "24 channels"])
def test_every_configuration_is_right(name):
    kernel = REAL[name]
    for config in kernel.configs(CARDS["h100"]):
        operands = operands_of(kernel, config)
        assert error(run(kernel, config, operands), expected(kernel, operands)) <= SUMS


def test_work_counts_what_blocks_do():
    kernel = conv(2, 5, 4, 32, 40, stride=2, add=True)  # 3 x 2 outputs, 12 pixels
    work = kernel.work(ConvConfig(16, 32, 32, 3, 4, splits=3))
    inside = [(r * 2 - 1 + i, c * 2 - 1 + j) for r in range(3) for c in range(2) for i in range(3) for j in range(3)]
    taps = 2 * sum(0 <= row < 5 and 0 <= column < 4 for row, column in inside)
    assert work.flops == 2 * 12 * 40 * 9 * 32
    assert work.issued_flops == 2 * 16 * 64 * 9 * 32
    assert work.map_bytes == 2 * (2 * 5 * 4 * 32 + 2 * 12 * 40)
    assert work.weight_bytes == 2 * 9 * 32 * 48 + 4 * 48
    assert work.blocks == 2 * 3
    partials = 2 * 4 * 6 * 16 * 32
    assert work.l2_bytes == 2 * 2 * taps * 32 + (2 * 9 * 32 + 4) * 48 + 2 * 2 * 12 * 40 + partials


def test_a_strided_1x1_reads_only_what_it_needs():
    assert conv(1, 6, 6, 16, 16, kernel=1, stride=2).work(SMALL).map_bytes == 2 * 2 * 9 * 16
