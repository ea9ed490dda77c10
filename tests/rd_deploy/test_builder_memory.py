"""The memory row that TensorRT-RTX's builder gives ``rd-bench``, without a GPU."""

import pytest
from chains import bottlenecks

from rd_deploy.bench import builder_memory
from rd_deploy.bench.builder_memory import SOURCE, TARGET, builder_rows
from rd_deploy.bench.models import Subject
from rd_deploy.common import UserError
from rd_deploy.export.onnx import to_onnx
from rd_deploy.trt.build import Profile, build
from rd_deploy.trt.flavours import load_flavour

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here (it has wheels for x86-64 only)")


def subject(shortcuts: bool) -> Subject:
    return Subject("residual" if shortcuts else "plain", "a test", to_onnx(bottlenecks(shortcuts=shortcuts)))


def test_rows_are_what_the_builder_says():
    rows = builder_rows((subject(False), subject(True)), ("fp32", "bf16"), (2,))
    assert [(row["model"], row["precision"]) for row in rows] == [
        ("plain", "fp32"),
        ("residual", "fp32"),
        ("plain", "bf16"),
        ("residual", "bf16"),
    ]
    content = to_onnx(bottlenecks(shortcuts=True), "bf16").SerializeToString()
    built = build(content, load_flavour("rtx"), Profile(2, 2, 2), (TARGET,))
    assert rows[3]["peak_bytes"] == built.activation_bytes
    assert rows[3]["weight_bytes"] == 2 * bottlenecks(shortcuts=True).parameters()
    assert {row["source"] for row in rows} == {SOURCE}
    assert all(row["how"].startswith(f"{SOURCE}: activation memory") for row in rows)
    assert {row["engine"] for row in rows} == {None}


def test_what_cannot_be_built_has_a_reason(monkeypatch):
    def refuse(*_):
        raise UserError("no such operator")

    monkeypatch.setattr(builder_memory, "build", refuse)
    (row,) = builder_rows((subject(False),), ("fp32",), (1,))
    assert (row["peak_bytes"], row["how"]) == (None, f"{SOURCE}: no such operator")


def test_without_tensorrt_rtx(monkeypatch):
    def missing(_):
        raise UserError("tensorrt_rtx is not usable here")

    monkeypatch.setattr(builder_memory, "load_flavour", missing)
    with pytest.raises(UserError, match="not usable here"):
        builder_rows((subject(False),), ("fp32",), (1,))
