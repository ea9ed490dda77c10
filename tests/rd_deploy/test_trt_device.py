"""`rd_deploy.trt.device` where there is no driver, and on the real cuda-core above a stand-in for the driver.

fake_cuda_checks.py holds the tests on the stand-in; one test here builds it, and runs them in a process of their own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from rd_deploy.common import UserError
from rd_deploy.trt import device

HERE = Path(__file__).parent


def run_python(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A script in a process of its own, which may end by a signal."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def without_a_gpu() -> None:
    pytest.importorskip("cuda.core")
    if device.no_gpu() is None:
        pytest.skip("there is a GPU here")


SESSION = """
import sys
from rd_deploy.common import UserError
from rd_deploy.trt.session import Session
for engine in sys.argv[1:]:
    try:
        Session(engine)
    except UserError as error:
        print(error)
print([name for name in ("torch", "tensorrt", "tensorrt_rtx", "cupy", "pycuda") if name in sys.modules])
"""


def test_without_a_driver_a_session_is_one_line_and_no_crash(tmp_path):
    without_a_gpu()
    engine = tmp_path / "net.engine"
    engine.write_bytes(b"engine")
    done = run_python(SESSION, str(engine), "nowhere.engine")
    assert (done.returncode, done.stderr) == (0, "")
    *lines, imported = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("running a TensorRT engine needs an NVIDIA GPU and driver; none is visible (")
    assert imported == "[]"  # TensorRT was not even loaded


RTX = """
import sys
from rd_deploy.common import UserError
from rd_deploy.preprocessing import Preprocessing
from rd_deploy.trt.build import Profile, build
from rd_deploy.trt.engine_file import EngineFile
from rd_deploy.trt.flavours import load_flavour
from rd_deploy.trt.session import Session, _Network
from test_trt_session import NETWORK, engine
flavour = load_flavour("rtx")
content = build(NETWORK, flavour, Profile(1, 4, 8), ("sm89",)).content
file = engine(None, content=content, flavour=flavour)
for make in (lambda: Session(file), lambda: _Network(file, type("Nothing", (), {"on_close": print})())):
    try:
        make()
    except UserError as error:
        print(error)
"""


def test_an_engine_of_tensorrt_rtx_without_a_driver():
    """A session says what is missing; the runtime itself, asked all the same, says what it can."""
    pytest.importorskip("tensorrt_rtx")
    without_a_gpu()
    done = run_python(RTX, PYTHONPATH=str(HERE))
    assert done.returncode == 0, done.stderr
    ours, _, theirs = done.stdout.splitlines()
    assert "needs an NVIDIA GPU and driver; none is visible" in ours
    assert theirs.startswith("TensorRT cannot load net.engine: ") or theirs.startswith("TensorRT cannot start: ")


def test_cuda_core_that_is_missing(monkeypatch):
    pytest.importorskip("cuda.bindings")
    for name in ("cuda.core", "cuda.core.experimental"):
        monkeypatch.setitem(sys.modules, name, None)
    assert device.no_gpu() == device.NO_CUDA_CORE.format("import of cuda.core.experimental halted; None in sys.modules")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert device.no_gpu().startswith("running a TensorRT engine needs cuda-core, which is not usable here (")


def test_cuda_core_of_either_place(monkeypatch):
    now, before = ModuleType("cuda.core"), ModuleType("cuda.core.experimental")
    monkeypatch.setitem(sys.modules, "cuda.core", now)
    monkeypatch.setitem(sys.modules, "cuda.core.experimental", before)
    with pytest.raises(UserError, match=r"which is not usable here \(it has no Stream\)"):
        device._core()
    before.Stream = object
    assert device._core() is before
    now.Stream = object
    assert device._core() is now


class Code(int):
    name = "CUDA_ERROR_NO_DEVICE"


@pytest.mark.parametrize(
    ("start", "count", "reason"),
    [
        ((Code(100),), None, "the driver says CUDA_ERROR_NO_DEVICE"),
        ((999,), None, "the driver says error 999"),
        ((0,), (0, 0), "the driver lists no GPU"),
        ((0,), (0, 1), None),
    ],
)
def test_what_the_driver_says(monkeypatch, start, count, reason):
    driver = SimpleNamespace(cuInit=lambda flags: start, cuDeviceGetCount=lambda: count)
    monkeypatch.setattr(device, "_driver", lambda: driver)
    monkeypatch.setattr(device, "_core", lambda: None)
    assert device.no_gpu() == (reason and device.NO_GPU.format(reason))


def test_device_and_session_on_the_real_cuda_core(tmp_path):
    pytest.importorskip("cuda.core")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the driver's stand-in needs Linux and a C compiler")
    library = tmp_path / "libcuda.so.1"
    command = [*compiler.split(), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*command, str(HERE / "fake_cuda.c")], check=True)
    checks = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "fake_cuda_checks.py")]
    done = subprocess.run(
        checks, capture_output=True, text=True, env=os.environ | {"RD_FAKE_CUDA": str(library)}, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
