"""examples/c/classify.c: what a C program makes of an image is what Python makes of it, and mistakes are one line."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rd_deploy.chain import INPUT, Chain, Conv, GlobalAveragePool, Linear
from rd_deploy.export.native import to_rdp
from rd_deploy.native import Session
from rd_deploy.native.library import PATH, library
from rd_deploy.preprocessing import Preprocessing

SOURCE = Path(__file__).parents[2] / "examples" / "c" / "classify.c"
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]


@pytest.fixture(scope="module", params=COMPILERS)
def program(request, tmp_path_factory) -> Path:
    library()  # a missing one says how to build it
    built = tmp_path_factory.mktemp("example") / "classify"
    warnings = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    include, rpath = PATH.parent / "include", f"-Wl,-rpath,{PATH.parent}"
    subprocess.run(
        [request.param, *warnings, "-O1", f"-I{include}", SOURCE, PATH, "-lm", rpath, "-o", built], check=True
    )
    return built


def chain(preprocessing: Preprocessing, classes: int = 7) -> Chain:
    rng, channels = np.random.default_rng(4), preprocessing.channels
    steps = (
        Conv("conv1", rng.standard_normal((16, channels, 3, 3)), rng.standard_normal(16), 2, 1, True, INPUT),
        Conv("conv2", rng.standard_normal((20, 16, 3, 3)) / 5, rng.standard_normal(20), 1, 1, True, "conv1"),
        GlobalAveragePool("mean", "conv2"),
        Linear("fc", rng.standard_normal((classes, 20)) / 4, rng.standard_normal(classes), "mean"),
    )
    shape = (channels, preprocessing.size, preprocessing.size)
    return Chain(steps, shape, preprocessing, tuple(f"class {index}, née ü" for index in range(classes)), name="tiny")


COLOUR = Preprocessing(24, 28, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
GREY = Preprocessing(28, 28, 1, (0.29,), (0.35,))
PADDED = Preprocessing(33, 28, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), pad=4)


def photo(height: int, width: int, channels: int) -> np.ndarray:
    """Smooth colours with noise, uint8 (height, width, channels)."""
    rng = np.random.default_rng(height * width)
    y, x, c = np.ogrid[:height, :width, :channels]
    wave = 128 + 90 * np.sin(y / 7 + c) * np.cos(x / 5 - c)
    return np.clip(wave + rng.normal(0, 20, (height, width, channels)), 0, 255).astype(np.uint8)


def write_image(path: Path, pixels: np.ndarray, comment: bytes = b"") -> Path:
    height, width, channels = pixels.shape
    path.write_bytes(b"P%d\n%s%d %d\n255\n" % (6 if channels == 3 else 5, comment, width, height) + pixels.tobytes())
    return path


def run(program: Path, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, encoding="utf-8")


@pytest.mark.parametrize(
    ("preprocessing", "height", "width"),
    [
        (COLOUR, 28, 28),  # cropped only
        (COLOUR, 61, 97),  # shrunk
        (COLOUR, 40, 17),  # enlarged, upright
        (COLOUR, 300, 301),
        (PADDED, 35, 28),  # padded, an odd difference
        (GREY, 28, 28),
        (GREY, 50, 31),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_agrees_with_python(program, precision, preprocessing, height, width, tmp_path):
    network = tmp_path / "tiny.rdp"
    network.write_bytes(to_rdp(chain(preprocessing), precision))
    pixels = photo(height, width, preprocessing.channels)
    session = Session(network, threads=1)
    logits = session.run(session.preprocessing.apply(pixels))[0].astype(np.float64)
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()

    ran = run(program, network, write_image(tmp_path / "image.ppm", pixels, b"# a comment\n"), 2)
    assert (ran.returncode, ran.stderr) == (0, "")
    found = [line.split("  ", 1) for line in ran.stdout.splitlines()]
    order = np.argsort(-expected)[:5]
    assert [name for _, name in found] == [session.classes[index] for index in order]
    # Means and deviations are float32 there; a value that then rounds to the other bf16 changes more.
    tolerance = 2e-5 if precision == "fp32" else 5e-3
    np.testing.assert_allclose([float(share) for share, _ in found], expected[order], atol=tolerance)


def test_few_classes(program, tmp_path):
    network = tmp_path / "tiny.rdp"
    network.write_bytes(to_rdp(chain(COLOUR, classes=2)))
    ran = run(program, network, write_image(tmp_path / "image.ppm", photo(30, 30, 3)))
    shares = [float(line.split()[0]) for line in ran.stdout.splitlines()]
    assert len(shares) == 2
    assert sum(shares) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "is no binary PPM or PGM"),
        (b"P3\n2 2\n255\n1 2 3", "is no binary PPM or PGM"),
        (b"\x89PNG\r\n", "is no binary PPM or PGM"),
        (b"P6\n", "no usable size"),
        (b"P6\n-4 4\n255\n", "no usable size"),
        (b"P6\n0 4\n255\n", "no usable size"),
        (b"P6\n99999999999999999999 4\n255\n", "no usable size"),
        (b"P6\n70000 70000\n255\n", "no usable size"),
        (b"P6\n4 4\n65535\n" + bytes(96), "8 bits"),
        (b"P6\n4 4\n255\n" + bytes(47), "ends before its last pixel"),
        (b"P6\n60000 1\n255\n" + bytes(180000), "too elongated"),
        (b"P5\n4 4\n255\n" + bytes(16), "other channels"),
    ],
)
def test_bad_images(program, content, reason, tmp_path):
    network, image = tmp_path / "tiny.rdp", tmp_path / "image.ppm"
    network.write_bytes(to_rdp(chain(Preprocessing(224, 256, 3, (0.5,) * 3, (0.5,) * 3))))
    if content is not None:
        image.write_bytes(content)
    refuses(run(program, network, image), reason)


def test_bad_networks_and_arguments(program, tmp_path):
    image = write_image(tmp_path / "image.ppm", photo(30, 30, 3))
    network, damaged = tmp_path / "tiny.rdp", tmp_path / "damaged.rdp"
    network.write_bytes(to_rdp(chain(COLOUR)))
    damaged.write_bytes(network.read_bytes()[:-64])
    refuses(run(program, tmp_path / "missing.rdp", image), "missing.rdp: No such file")
    refuses(run(program, damaged, image), "damaged.rdp")
    refuses(run(program, network, image, 0), "threads")
    refuses(run(program, network, image, "many"), "threads")
    refuses(run(program, network), "NETWORK.rdp IMAGE")


def refuses(ran: subprocess.CompletedProcess, reason: str) -> None:
    assert (ran.returncode, ran.stdout) == (2, "")
    assert reason in ran.stderr
    assert ran.stderr.count("\n") == 1
