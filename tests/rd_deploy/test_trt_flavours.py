"""Which TensorRT is taken, what is said when there is none, and how a builder's failures are told."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from rd_deploy.common import UserError
from rd_deploy.trt.flavours import MODULES, Flavour, choose_flavour, load_flavour
from rd_deploy.trt.messages import Messages


@pytest.fixture
def installed(monkeypatch):
    """Make exactly these flavours importable."""

    def make(*names: str) -> None:
        for name, module in MODULES.items():
            fake = ModuleType(module)
            fake.__version__ = "1.0"
            monkeypatch.setitem(sys.modules, module, fake if name in names else None)

    return make


@pytest.mark.parametrize(
    ("have", "gpu", "chosen"),
    [
        (("tensorrt", "rtx"), True, "tensorrt"),
        (("tensorrt", "rtx"), False, "rtx"),
        (("rtx",), True, "rtx"),
        (("tensorrt",), True, "tensorrt"),
    ],
)
def test_auto_takes_enterprise_tensorrt_where_it_can_build(installed, have, gpu, chosen):
    installed(*have)
    assert choose_flavour("auto", gpu).name == chosen


def test_a_flavour_that_is_named_is_taken_or_refused(installed):
    installed("rtx")
    assert choose_flavour("rtx", gpu=True).title == "TensorRT-RTX 1.0"
    with pytest.raises(UserError, match=r"tensorrt is not usable here .*pip install '\.\[tensorrt\]'"):
        choose_flavour("tensorrt", gpu=True)
    with pytest.raises(UserError, match=r"unknown TensorRT flavour 'rtxx' \(did you mean 'rtx'\?\)"):
        choose_flavour("rtxx", gpu=False)


@pytest.mark.parametrize("gpu", [False, True])
def test_nothing_is_installed(installed, gpu):
    installed()
    with pytest.raises(UserError, match=r"no TensorRT that can build here: .*pip install '\.\[rtx\]'") as error:
        choose_flavour("auto", gpu)
    assert "\n" not in str(error.value)
    assert ("'.[tensorrt]'" in str(error.value)) == gpu


def test_a_broken_installation_is_one_line(monkeypatch):
    broken = SimpleNamespace(find_spec=lambda *_: (_ for _ in ()).throw(ImportError("libnvinfer.so.11:\n cannot open")))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(sys, "meta_path", [broken, *sys.meta_path])
    with pytest.raises(UserError, match=r"libnvinfer\.so\.11: cannot open"):
        load_flavour("tensorrt")


class FakeLogger:
    """The logger's interface of a TensorRT module."""

    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)


def messages(*said: tuple[int, str]) -> Messages:
    collected = Messages(SimpleNamespace(ILogger=FakeLogger))
    for severity, text in said:
        collected.logger.log(severity, text)
    return collected


def test_a_failure_has_its_first_telling_error():
    """Without a driver every failure is followed, and some are preceded, by an error about CUDA."""
    collected = messages(
        (3, "info"), (1, "[catchCudaError] no driver"), (1, "first\n  reason"), (0, "later"), (2, "warning")
    )
    assert collected.reason() == "first reason"
    assert collected.lines[0] == "info"
    with pytest.raises(UserError, match=r"^TensorRT cannot build the network: first reason$"):
        collected.checked(None, "build the network")
    with pytest.raises(UserError):
        collected.checked(False, "build the network")
    assert collected.checked(0, "count") == 0


def test_a_failure_without_a_reason():
    assert messages((3, "info")).reason() == "it gives no reason"
    assert messages((1, "[catchCudaError] no driver")).reason() == "[catchCudaError] no driver"
    assert len(messages((1, "x" * 10_000)).reason()) < 300


def test_a_flavours_title():
    assert Flavour("tensorrt", SimpleNamespace(__version__="11.4.0.106")).title == "TensorRT 11.4.0.106"
