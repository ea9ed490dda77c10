"""Whole networks on the AMX kernels, with the tile instructions emulated, so that any machine can test them.

What is emulated are the tile instructions alone (src/kernels/tiles_emulated.h): windows, groups of pixels, order of the
products, biases and additions are those of the real kernel.
"""

import numpy as np
import pytest
from chains import ChainBuilder, images_for

from rd_deploy.chain import Chain
from rd_deploy.engines import get_engine
from rd_deploy.export.native import to_rdp
from rd_deploy.export.onnx import to_onnx
from rd_deploy.fold import fold
from rd_deploy.native import Flag, Network, available_isas
from rd_deploy.native import library as c
from rd_deploy.native.build import OBJECTS, BuildError
from rd_deploy.random_weights import random_images, random_network
from rd_train.networks import parse_arch

# Of the largest error, in standard deviations of the logits. bfloat16 rounds every map and weight at 4e-3, and 50
# layers with random weights multiply that: the portable bf16 kernels are off by up to 0.22 here. Each product is
# checked to its rounding in tests/native/test_kernels.cpp; a wrong one, or a wrong list of pixels, is off by 1 or more.
# Two bfloat16 for each number round at 8e-6 instead, which is 500 times less.
TOLERANCE = {"amx_bf16": 0.4, "amx_bf16x2": 1e-3}
PRECISION = {"amx_bf16": "bf16", "amx_bf16x2": "fp32"}
both = pytest.mark.parametrize("isa", PRECISION)
NETWORKS = {
    "plain50": (parse_arch("plain50", classes=20, width=0.5), 64),
    "resnet50": (parse_arch("resnet50", classes=20, width=0.5), 64),
    "plain20": (parse_arch("plain20", classes=10), 32),
    "resnet20": (parse_arch("resnet20", classes=10), 32),
    "narrow plain50": (parse_arch("plain50", classes=20, width=0.3), 40),
}


@pytest.fixture(scope="module", autouse=True)
def emulated(emulated_build):
    """The library with emulated tiles, in place of the built one for this module's tests."""
    try:
        path = emulated_build().library(OBJECTS / "emulated")
    except BuildError as reason:
        pytest.skip(str(reason))
    loaded = c.load(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c, "library", lambda: loaded)
        yield


def chain_of(name: str) -> Chain:
    arch, size = NETWORKS[name]
    return fold(random_network(arch, size), size)


def check(chain: Chain, images: np.ndarray, isa: str, flags: Flag = Flag.NONE) -> None:
    """Against float32 in ONNX Runtime; on one thread and on three, which do not change a bit."""
    expected = get_engine("onnxruntime").load(to_onnx(chain), "fp32", 1, len(images)).run(images)
    network = Network.from_bytes(to_rdp(chain, PRECISION[isa]))
    one, three = (network.plan(len(images), threads, isa, flags).context().run(images) for threads in (1, 3))
    assert np.abs(one - expected).max() < TOLERANCE[isa] * expected.std()
    np.testing.assert_array_equal(one, three)


def test_tiles_come_first_and_two_for_each_number_are_only_taken_by_name():
    assert available_isas() == ("amx_bf16", "portable", "amx_bf16x2")
    chosen = [Network.from_bytes(to_rdp(chain_of("plain20"), each)).plan(1, 1).info.isa for each in ("bf16", "fp32")]
    assert chosen == ["amx_bf16", "portable"]


def test_weights_are_repacked_for_two_of_them():
    network = Network.from_bytes(to_rdp(chain_of("plain20"), "fp32"))
    steps = network.plan(1, 1, "amx_bf16x2").steps
    assert network.plan(1, 1, "amx_bf16x2").info.packed_bytes == sum(step.weight_bytes for step in steps)
    assert network.plan(1, 1, "portable", Flag.NO_WINOGRAD).info.packed_bytes == 0


@both
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, isa):
    arch, size = NETWORKS[name]
    check(chain_of(name), random_images(2, arch.in_channels, size), isa)


@both
@pytest.mark.parametrize("flags", [Flag.UNFUSED, Flag.SMALL])
@pytest.mark.parametrize("batch", [1, 5])
def test_plans(flags, batch, isa):
    arch, size = NETWORKS["plain50"]
    check(chain_of("plain50"), random_images(batch, arch.in_channels, size), isa, flags)


@both
def test_odd_shapes(isa):
    """Channels that fill no tile, lists of pixels that do not either, strides, and an image of five channels."""
    chain = ChainBuilder(channels=5, seed=3)
    chain.conv(32, 5)
    chain.pool(2, 2)
    for out, kernel, stride in ((33, 1, 2), (64, 3, 1), (70, 3, 2), (96, 1, 1), (17, 3, 1)):
        chain.conv(out, kernel, stride)
    last = chain.last
    chain.conv(17, 3, add=last)
    finished = chain.finish(23, 17, classes=3)
    check(finished, images_for(finished, 3), isa)
