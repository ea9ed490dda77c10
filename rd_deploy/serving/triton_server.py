"""Model repositories of NVIDIA's Triton Inference Server (no relation of the language of our GPU kernels).

A repository is a folder with a folder per model: its configuration, its labels, our sidecar, and the model's file in a
folder named by its version. docs/serving.md says what of it a real server has run, and what none has yet.
"""

import hashlib
import json
import os
import re
from pathlib import Path

from rd_deploy.common import UserError
from rd_deploy.export.files import check_place, sidecar_values
from rd_deploy.serving.folders import atomic_folder
from rd_deploy.serving.triton_config import LABELS, config_text

CONFIG, SIDECAR, VERSION = "config.pbtxt", "sidecar.json", "1"
MODEL_FILES = {False: "model.onnx", True: "model.plan"}  # by `engine`: the names that the backends look for
# What is wrong with ONNX files of a precision in ONNX Runtime 1.32, as seen on a CPU; of GPUs as its table of kernels
# says (docs/OperatorKernels.md). The pass that drops the ReLU can be disabled by name, but not in a configuration.
UNSERVED = {
    "bf16": "has no bf16 convolution on a CPU and no bf16 pooling on a GPU",
    "fp8": "drops the ReLU before a float8 Q, so that logits are wrong",
}
# The server takes names out of URLs as they are, without undoing %-escapes; a leading dot would hide the folder.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


# --- before the work


def check_repository(folder: str | Path, name: str) -> None:
    """Raise `UserError` unless a model of this name can be written to the repository ``folder``, which need not exist.

    Refused: a name that cannot be asked for by URL, a place that is no folder or cannot be written, and a model's
    folder that `write_model` did not write or that was edited since.
    """
    folder = Path(folder)
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a model of the server; give the file a name of A-Z a-z 0-9 _ . - (at most 128, "
            "and no . or - first)"
        )
    check_place(folder.absolute(), folder, "choose another folder")
    if (folder / CONFIG).exists():
        raise UserError(f"{folder} is the folder of one model; name the repository that it lies in")
    if (folder / name).exists() or (folder / name).is_symlink():
        _check_ours(folder / name)


def check_replaced(folder: Path, name: str, sidecar: dict) -> None:
    """Raise `UserError` if the repository has another network under this name: of other images or classes.

    Every run's file is called model.pt, and its clients would get logits of something else.
    """
    old = sidecar_values(folder / name / SIDECAR)
    if old is not None and any(old.get(key) != sidecar[key] for key in ("input", "classes")):
        raise UserError(
            f"{folder / name} is a network for other images or classes; export under another name "
            "(--out OTHER.onnx), or remove it"
        )


def check_onnx(precision: str) -> None:
    """Raise `UserError` for an ONNX file that the server's ONNX Runtime cannot run, or computes wrongly."""
    if precision in UNSERVED:
        raise UserError(
            f"the server runs ONNX files by ONNX Runtime, which {UNSERVED[precision]}; add --trt to serve a TensorRT "
            "engine, or export in fp32, fp16 or int8"
        )


def check_engine(flavour: str, batches: tuple[int, int, int]) -> None:
    """Raise `UserError` for a TensorRT engine that the server cannot use.

    ``flavour``: "tensorrt" or "rtx". ``batches``: smallest, optimal and largest of the engine's profile.
    """
    if flavour != "tensorrt":
        raise UserError(
            "the server cannot load TensorRT-RTX engines; use --trt-flavour tensorrt, or leave --trt away for ONNX"
        )
    smallest, optimum, largest = batches
    if smallest != 1:
        raise UserError(
            f"the server may ask for any batch from 1 to {largest}, but the engine's smallest is {smallest}; "
            f"build it with --batch 1:{optimum}:{largest}"
        )


def _check_ours(target: Path) -> None:
    """Refuse to replace a folder that holds anything but what `write_model` wrote."""
    move = "move it away, or export under another name"
    sidecar = None if target.is_symlink() else sidecar_values(target / SIDECAR)
    if sidecar is None:
        raise UserError(f"{target} exists and is no model of rd-export; {move}")
    found = {path.relative_to(target).as_posix() for path in target.rglob("*")}
    others = found - {CONFIG, LABELS, SIDECAR, VERSION, *(f"{VERSION}/{file}" for file in MODEL_FILES.values())}
    if others:
        raise UserError(f"{target} holds {min(others)}, which rd-export did not write; {move}")
    if CONFIG in found and _sha256((target / CONFIG).read_bytes()) != sidecar.get("config_sha256"):
        raise UserError(f"{target / CONFIG} was edited; {move}")


# --- writing


def write_model(
    folder: str | Path, name: str, content: bytes, sidecar: dict, *, engine: bool, batches: tuple[int, int, int]
) -> Path:
    """Write the model ``name`` into the repository ``folder`` and return its folder; an earlier export is replaced.

    ``content``: the model's file, ONNX or (``engine``) a TensorRT plan. ``sidecar``: what `describe` or
    `describe_engine` returns. ``batches``: smallest, optimal and largest batch; of ONNX, which takes any, those to
    configure. Raises `UserError` as `check_repository`, `check_onnx` and `check_engine` do, and when writing fails;
    then nothing has changed.
    """
    if engine:
        check_engine(sidecar["engine"]["flavour"], batches)
    else:
        check_onnx(sidecar["precision"])
    check_repository(folder, name)
    folder = Path(folder).absolute()
    config = config_text(name, sidecar, engine=engine, batches=batches).encode("ascii")
    labels = "".join(f"{_label(label)}\n" for label in sidecar["classes"])
    file = f"{VERSION}/{MODEL_FILES[engine]}"
    values = {**sidecar, "model": file, "config_sha256": _sha256(config)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    with atomic_folder(folder / name, _workplace(folder)) as new:
        (new / VERSION).mkdir()
        (new / file).write_bytes(content)
        (new / CONFIG).write_bytes(config)
        (new / LABELS).write_text(labels, encoding="utf-8", errors="replace", newline="")
        (new / SIDECAR).write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return folder / name


def _label(name: str) -> str:
    """A class name as a line of the label file, which knows no escapes: line breaks become spaces."""
    return " ".join(name.splitlines())


def _workplace(folder: Path) -> Path:
    """Where a model is put together: beside the repository, where a server does not see it.

    Inside, a server takes every folder for a model, hidden ones too: it logs an error while it polls, and does not
    start if it finds what a killed export left. Where beside is not writable, or another file system, there is no other
    way; nor where it is another mount of the same one, which `atomic_folder` finds out.
    """
    parent = folder.resolve().parent
    beside = os.access(parent, os.W_OK) and parent.stat().st_dev == folder.stat().st_dev
    return parent if beside else folder


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
