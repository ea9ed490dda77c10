"""Engine files and the sidecars that say what they are: checked before a byte of an engine reaches TensorRT.

An engine is code. TensorRT trusts it, refuses other versions and GPUs with messages that do not help, and may crash;
the JSON beside it is what can be checked. It protects from mistakes, not from somebody who forges both files.
"""

import hashlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from rd_deploy.common import UserError, check_file
from rd_deploy.export.files import read_sidecar
from rd_deploy.preprocessing import Preprocessing
from rd_deploy.trt.build import Built, Profile
from rd_deploy.trt.flavours import MODULES, Flavour, load_flavour
from rd_deploy.trt.layers import widened

MAX_ENGINE_BYTES = 8 << 30


@dataclass(frozen=True)
class EngineFile:
    """An engine whose sidecar was checked. ``input_shape``: (C, H, W) of one image; ``profile``: batch sizes it takes.

    ``targets``: compute capabilities such as ``sm89``. ``activation_bytes``: device memory of maps and workspaces, None
    where the builder did not say. ``rebuild``: the command that builds it again from its ONNX file.
    """

    path: Path
    content: bytes
    flavour: Flavour
    profile: Profile
    targets: tuple[str, ...]
    input_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    activation_bytes: int | None
    rebuild: str
    sidecar: dict

    def check_target(self, target: str) -> None:
        """Raise `UserError` unless the engine was built for this compute capability."""
        if target in self.targets:
            return
        offered = getattr(getattr(self.flavour.module, "ComputeCapability", None), "__members__", {})
        if offered and target.upper() not in offered:
            advice = f"{self.flavour.title} builds none for it, enterprise TensorRT does: --trt-flavour tensorrt, there"
        else:
            advice = _advice(rebuild_command(self.sidecar["engine"] | {"targets": [target]}, self.path.name))
        raise UserError(f"{self.path} is for {', '.join(self.targets)}, and the GPU is {target}; {advice}")


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of an engine lies: not at .json, which is that of the ONNX file."""
    return path.with_name(path.name + ".json")


def describe_engine(
    onnx: dict,
    path: Path,
    built: Built,
    flavour: Flavour,
    profile: Profile,
    targets: tuple[str, ...],
) -> dict:
    """The sidecar of an engine that has not been run, from that of the ONNX file it was built from (``onnx``)."""
    values = {key: value for key, value in onnx.items() if key not in ("opset", "weight_bytes")}
    engine = {
        "flavour": flavour.name,
        "version": flavour.version,
        "targets": list(targets),
        "profile": profile.to_list(),
        "onnx": onnx["model"],
        "onnx_sha256": onnx["sha256"],
        "activation_bytes": built.activation_bytes,
        "weight_bytes": built.weight_bytes,
        # None where the builder lists no layers: nothing is known of them then.
        "widened": widened(built.layers) if built.layers else None,
        "reformats": sum(layer.is_reformat for layer in built.layers) if built.layers else None,
        "layers": [layer.to_dict() for layer in built.layers] or None,
    }
    return values | {
        "model": path.name,
        "sha256": hashlib.sha256(built.content).hexdigest(),
        "bytes": len(built.content),
        "parity": None,
        "onnx_parity": onnx["parity"],
        "engine": engine | {"rebuild": rebuild_command(engine, path.name)},
        "versions": onnx["versions"] | {MODULES[flavour.name]: flavour.version},
    }


def rebuild_command(engine: dict, name: str) -> str:
    """What to type, in the folder of the ONNX file, to build an engine again."""
    targets = [] if engine["flavour"] == "tensorrt" else ["--target", ",".join(engine["targets"])]
    profile = Profile.from_list(engine["profile"])
    words = [
        "rd-export",
        engine["onnx"],
        "--trt",
        "--trt-flavour",
        engine["flavour"],
        *targets,
        "--batch",
        str(profile),
    ]
    return shlex.join([*words, "--out", name])


def read_engine(path: str | Path) -> EngineFile:
    """Read an engine and check it against its sidecar and the TensorRT that is installed.

    Raises `UserError` for a missing or damaged file, another flavour or version than is installed, or an engine that
    is not the one the sidecar describes; the message says how to build it again.
    """
    path = check_file(path, "engine", MAX_ENGINE_BYTES)
    sidecar = sidecar_path(path)
    if not sidecar.exists():
        raise UserError(
            f"{path} has no {sidecar.name} beside it, without which no engine is run; copy or export it again"
        )
    return engine_file(path, path.read_bytes(), read_sidecar(sidecar, KINDS))


def engine_file(path: Path, content: bytes, sidecar: dict) -> EngineFile:
    """An engine that is in memory, checked against its sidecar as `read_engine` does."""
    engine, name = _engine(sidecar["engine"], path), sidecar_path(path).name
    rebuild = rebuild_command(engine, path.name)  # not the one that the file gives: it will be typed by somebody
    if len(content) != sidecar["bytes"] or hashlib.sha256(content).hexdigest() != sidecar["sha256"]:
        raise UserError(f"{path} is not the engine that {name} describes; {_advice(rebuild)}")
    flavour = load_flavour(engine["flavour"])
    if flavour.version != engine["version"]:
        raise UserError(f"{path} is of version {engine['version']}, here is {flavour.title}; {_advice(rebuild)}")
    return EngineFile(
        path=path,
        content=content,
        flavour=flavour,
        profile=Profile.from_list(engine["profile"]),
        targets=tuple(engine["targets"]),
        input_shape=_image_shape(sidecar, path),
        classes=_classes(sidecar, path),
        preprocessing=Preprocessing.from_dict(sidecar["preprocessing"]),
        activation_bytes=engine["activation_bytes"],
        rebuild=rebuild,
        sidecar=sidecar,
    )


# What a sidecar must hold, and of which type.
KINDS = {"bytes": int, "sha256": str, "input": dict, "classes": list, "preprocessing": dict, "engine": dict}
ENGINE_KINDS = {
    "flavour": str,
    "version": str,
    "targets": list,
    "profile": list,
    "onnx": str,
    "activation_bytes": int | None,
}


def _engine(values: dict, path: Path) -> dict:
    wrong = [name for name, kind in ENGINE_KINDS.items() if not isinstance(values.get(name), kind)]
    if not wrong and not all(isinstance(name, str) and re.fullmatch(r"sm\d+", name) for name in values["targets"]):
        wrong = ["targets"]
    if not wrong and not _is_file_name(values["onnx"]):
        wrong = ["onnx"]
    if wrong:
        raise UserError(f"{sidecar_path(path)} says nothing usable of {', '.join(wrong)}; export the engine again")
    return values


def _is_file_name(name: str) -> bool:
    """Whether a name can be printed in a command that somebody may type: no path, no option, nothing for a terminal."""
    return bool(name) and name.isprintable() and "/" not in name and not name.startswith("-")


def _classes(values: dict, path: Path) -> tuple[str, ...]:
    if not all(isinstance(name, str) for name in values["classes"]):
        raise UserError(f"{sidecar_path(path)} gives class names that are no texts; export the engine again")
    return tuple(values["classes"])


def _image_shape(values: dict, path: Path) -> tuple[int, int, int]:
    shape = values["input"].get("shape")
    if not (isinstance(shape, list) and len(shape) == 4 and all(type(size) is int and size > 0 for size in shape[1:])):
        raise UserError(f"{sidecar_path(path)} gives no usable shape of the images; export the engine again")
    return tuple(shape[1:])


def _advice(command: str) -> str:
    return f"build it again: {command}"
