"""The GPU's expand and reduce in one kernel, in Triton's interpreter, against torch in float64."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernels import TYPES, checked_configs, error, run_guarded, with_guards

from rd_deploy.chain import Conv
from rd_deploy.common import UserError
from rd_deploy.triton_kernels.cards import CARDS
from rd_deploy.triton_kernels.expand_reduce import ExpandReduceConfig, ExpandReduceKernel

SUMS = 3e-6  # of the largest output: sums in fp32
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-7}  # relative; the interpreter rounds to fp16 and cuts off to bf16

WIDTHS = [(64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
H100, OTHERS = CARDS["h100"], [CARDS[name] for name in ("a100", "l4", "b200", "rtx5090")]


def expand_reduce(batch, height, width, channels, outputs, hidden=None):
    return ExpandReduceKernel(batch, height, width, channels, hidden or 4 * channels, outputs)


def step_of(random, inputs, outputs):
    weight = random.standard_normal((outputs, inputs, 1, 1)) / inputs**0.5
    return Conv("conv", weight, random.standard_normal(outputs) / 2, 1, 0, True, "x")


def steps_of(kernel, seed=0):
    random = np.random.default_rng(seed)
    return step_of(random, kernel.channels, kernel.hidden), step_of(random, kernel.hidden, kernel.outputs)


def operands_of(kernel, element="fp32", seed=0):
    """Map and weights; what lies beside them is not a number, so that reading it would be seen."""
    torch.manual_seed(seed)
    operands = {"x": torch.randn(kernel.batch, kernel.height, kernel.width, kernel.channels)}
    operands |= {name: torch.tensor(values) for name, values in kernel.weights(*steps_of(kernel, seed)).items()}
    return with_guards(operands, element)


def scratch_of(kernel, config):
    """As it is before the first run: whatever lies there, but counters of zero."""
    return {
        name: torch.full((elements,), 0 if kind == "i32" else float("nan"), dtype=TYPES[kind])
        for name, (kind, elements) in kernel.scratch(config).items()
    }


def expected(kernel, operands):
    return kernel.reference(**{name: values.double() for name, values in operands.items()})


def run(kernel, config, operands, scratch=None):
    operands = {**operands, **(scratch or scratch_of(kernel, config))}
    return run_guarded(kernel, config, operands, (kernel.batch, kernel.height, kernel.width, kernel.outputs))


def bound(kernel, operands, element):
    """Largest error per output when the wide map and the output are rounded, each sum exact."""
    rounding = ROUNDING[element]
    x, w2, b2, w3, b3 = (values.double() for values in operands.values())
    wide = (x @ w2 + b2).relu()
    sum_error = rounding * wide @ w3.abs()
    return rounding * ((wide @ w3 + b3).relu() + sum_error) + sum_error


CASES = {
    "ragged": (expand_reduce(2, 5, 7, 64, 64), ExpandReduceConfig(64, 64, 64, 3, 4)),
    "one pixel": (expand_reduce(1, 1, 1, 64, 128), ExpandReduceConfig(16, 128, 32, 2, 1)),
    "a tile exactly": (expand_reduce(1, 8, 8, 16, 16), ExpandReduceConfig(64, 16, 16, 2, 4)),
    "hidden 48": (expand_reduce(1, 3, 7, 32, 16, hidden=48), ExpandReduceConfig(16, 16, 16, 3, 1)),
    "outputs apart": (expand_reduce(1, 5, 5, 64, 256), ExpandReduceConfig(16, 64, 64, 2, 1)),
    "split": (expand_reduce(1, 7, 7, 64, 64), ExpandReduceConfig(32, 64, 32, 3, 2, split=4)),
    "split, one step each": (expand_reduce(2, 3, 3, 16, 32), ExpandReduceConfig(16, 32, 16, 2, 1, split=4)),
    "split, outputs apart": (expand_reduce(1, 5, 4, 128, 128), ExpandReduceConfig(16, 64, 64, 2, 1, split=2)),
    "split, hidden 48": (expand_reduce(1, 3, 7, 32, 16, hidden=48), ExpandReduceConfig(32, 16, 16, 2, 2, split=3)),
}
SPLIT = [case for case in CASES if case.startswith("split")]


@pytest.mark.parametrize("case", CASES)
def test_matches_torch(case):
    kernel, config = CASES[case]
    operands = operands_of(kernel)
    assert error(run(kernel, config, operands), expected(kernel, operands)) <= SUMS


@pytest.mark.parametrize("element", ["fp16", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_errs_by_its_roundings_only(case, element):
    kernel, config = CASES[case]
    operands = operands_of(kernel, element)
    wanted = expected(kernel, operands)
    wrong = (run(kernel, config, operands).double() - wanted).abs()
    assert (wrong <= bound(kernel, operands, element) + SUMS * wanted.max()).all()


@pytest.mark.parametrize("case", CASES)
def test_control_swapped_hidden_channels_are_seen(case):
    kernel, config = CASES[case]
    operands = operands_of(kernel)
    wrong = {**operands, "w3": operands["w3"].roll(1, 0)}
    assert error(run(kernel, config, operands), expected(kernel, wrong)) > 0.05


@pytest.mark.parametrize("case", SPLIT)
def test_splits_leave_their_counters_ready_for_the_next_run(case):
    kernel, config = CASES[case]
    operands = operands_of(kernel, "fp16")
    scratch = scratch_of(kernel, config)
    first = run(kernel, config, operands, scratch)
    assert (scratch["counters"] == 0).all()
    scratch["partial"].fill_(float("nan"))  # whatever other launches leave there
    assert torch.equal(run(kernel, config, operands, scratch), first)


def test_control_a_counter_that_was_not_reset_is_seen():
    kernel, config = CASES["split"]
    scratch = scratch_of(kernel, config)
    scratch["counters"][0] = 1
    got = run(kernel, config, operands_of(kernel), scratch)
    assert got.isnan().any() or (got == -5).any()  # the tile was summed too early, or never


@pytest.mark.parametrize(("channels", "outputs"), WIDTHS)
def test_configurations_of_cards_are_right(channels, outputs):
    """What is timed for real maps, on maps of a few pixels."""
    size = 56 * 64 // channels
    real = [expand_reduce(batch, size, size, channels, outputs) for batch in (1, 32)]
    options = {(c.block_m, c.split, c.block_n < outputs): c for kernel in real for c in kernel.configs(H100)}
    configs = [*list(options.values())[:: max(1, channels // 128)], *(real[0].configs(card)[0] for card in OTHERS)]
    kernel = expand_reduce(1, 3, 5, channels, outputs, hidden=256)
    configs = [c for c in configs if kernel.hidden % (c.block_h * c.split) == 0]
    assert len(configs) >= 2
    operands = operands_of(kernel)
    wanted = expected(kernel, operands)
    for config in configs:
        assert error(run(kernel, config, operands), wanted) <= SUMS, config


@pytest.mark.parametrize("case", ["ragged", "split"])
def test_what_is_not_a_number_stays_so_where_it_reaches(case):
    kernel, config = CASES[case]
    operands = operands_of(kernel)
    operands["x"][0, 1, 2, 3] = float("nan")
    wanted = torch.zeros(kernel.batch, kernel.height, kernel.width, kernel.outputs, dtype=torch.bool)
    wanted[0, 1, 2] = True
    assert torch.equal(run(kernel, config, operands).isnan(), wanted)


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        (expand_reduce(1, 4, 4, 48, 64), "48 channels"),
        (expand_reduce(1, 4, 4, 1024, 512), "1024 channels"),
        (expand_reduce(1, 4, 4, 64, 1024), "1024 outputs"),
        (expand_reduce(1, 4, 4, 64, 64, hidden=8), "8 hidden"),
        (expand_reduce(12000, 56, 56, 64, 64), "2\\^31"),
    ],
)
def test_other_shapes_are_refused(kernel, what):
    with pytest.raises(UserError, match=what):
        kernel.check()


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("channels", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("outputs", [16, 64, 256, 512])
def test_configurations_fit_the_card(card, channels, outputs):
    for batch in (1, 32):
        kernel = expand_reduce(batch, 14, 14, channels, outputs)
        for config, _, launch in checked_configs(kernel, card):
            assert outputs % config.block_n == kernel.hidden % (config.block_h * config.split) == 0
            scratch = kernel.scratch(config)
            assert (scratch == {}) == (config.split == 1)
            assert all(launch.tensors[name] == kind for name, (kind, _) in scratch.items())


def test_a_small_map_is_split_and_a_large_one_is_not():
    assert any(config.split > 1 for config in expand_reduce(1, 14, 14, 256, 256).configs(H100))
    assert all(config.split == 1 for config in expand_reduce(128, 28, 28, 128, 128).configs(H100))


def test_work_counts_what_blocks_do():
    kernel = expand_reduce(1, 5, 4, 64, 128)  # 20 pixels: 2 tiles of 16
    expand, reduce = 64 * 256, 256 * 128
    work = kernel.work(ExpandReduceConfig(16, 64, 64, 2, 1, split=2))
    assert work.flops == 2 * 20 * (expand + reduce)
    assert work.issued_flops == 2 * 32 * (2 * expand + reduce)
    assert work.map_bytes == 2 * 20 * (64 + 128)
    assert work.weight_bytes == 2 * (expand + reduce) + 4 * (256 + 128)
    assert work.blocks == 2 * 2 * 2
    tile_weights = 2 * expand + reduce + 4 * (256 + 64)  # of half the outputs, shared by two splits
    partial = 2 * 4 * 8 * 16 * 64  # written once and read once
    assert work.l2_bytes == 2 * 2 * 2 * 20 * 64 + 4 * tile_weights + 2 * 20 * 128 + partial
    assert kernel.scratch(ExpandReduceConfig(16, 64, 64, 2, 1, split=2)) == {
        "partial": ("fp32", 8 * 16 * 64),
        "counters": ("i32", 4),
    }
