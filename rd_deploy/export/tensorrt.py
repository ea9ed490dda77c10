"""TensorRT engines from our ONNX files: built, checked layer by layer, compared with the file where there is a GPU."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from rd_deploy.common import CheckFailed, UserError
from rd_deploy.export import files
from rd_deploy.export.files import Artefact, read_sidecar
from rd_deploy.export.onnx import read_metadata
from rd_deploy.export.onnx import sidecar_path as onnx_sidecar_path
from rd_deploy.onnx_files import load_model, runtime_inputs
from rd_deploy.parity import CLEAR_MARGINS, Run, Way, compare_ways, in_batches, onnx_runner, onnx_ways, whole_batches
from rd_deploy.trt import SUFFIX
from rd_deploy.trt.build import Built, Profile, build, choose_targets
from rd_deploy.trt.device import Gpu, no_gpu
from rd_deploy.trt.engine_file import describe_engine, engine_file, sidecar_path
from rd_deploy.trt.flavours import Flavour, choose_flavour
from rd_deploy.trt.layers import QUANTISED, Layer

REFERENCE_BATCH = 32  # images at a time in ONNX Runtime, whatever the engine takes: its memory grows with them
# What an engine's sidecar takes over from that of its ONNX file.
ONNX_KINDS = {"model": str, "versions": dict, "provenance": dict, "parity": dict | None}


class PrecisionError(CheckFailed):
    """An engine that runs convolutions in another precision than was asked for; the message is one line."""


@dataclass(frozen=True)
class Settings:
    """What to build, and ``unseen``: why the engine cannot be run here, None where it can."""

    flavour: Flavour
    profile: Profile
    targets: tuple[str, ...]
    unseen: str | None


def choose_settings(flavour: str, targets: tuple[str, ...] | None, profile: Profile, precision: str) -> Settings:
    """Everything that can be refused before a network is loaded; asks for a GPU before TensorRT is touched."""
    reason = no_gpu()
    gpu = None if reason else _target()
    chosen = choose_flavour(flavour, gpu is not None)
    if chosen.name == "tensorrt" and reason:
        raise UserError(
            f"{chosen.title} builds on the GPU that will run the engine, and there is none ({reason}); run this there, "
            "or pass --trt-flavour rtx, which builds without a GPU"
        )
    built_for = choose_targets(chosen, targets, precision, gpu)
    if not reason and gpu not in built_for:
        reason = f"it is for {', '.join(built_for)}, and the GPU here is {gpu}"
    return Settings(chosen, profile, built_for, reason)


def _target() -> str:
    """The compute capability of the first GPU, such as ``sm89``."""
    with contextlib.closing(Gpu()) as gpu:
        return gpu.target


def check_target(path: str | Path) -> Path:
    """The output path, if it ends in .engine, can be written and nothing of others is in the way: before the work."""
    path = Path(path)
    files.check_target(path, SUFFIX, sidecar_path(path))
    return path


def read_onnx(path: Path) -> Artefact:
    """An ONNX file of `rd-export` and its sidecar, to build an engine from it where there is no checkpoint."""
    model = load_model(path)
    metadata, images = read_metadata(model), runtime_inputs(model)[0].type.tensor_type
    sidecar, content = read_sidecar(onnx_sidecar_path(path), ONNX_KINDS), path.read_bytes()
    artefact = Artefact(path, content, onnx_sidecar_path(path), sidecar)
    inside = {
        "precision": metadata.precision,
        "name": metadata.name,
        "classes": list(metadata.classes),
        "preprocessing": metadata.preprocessing.to_dict(),
        "sha256": artefact.sha256,
        **files.tensors([dim.dim_value for dim in images.shape.dim[1:]], len(metadata.classes)),
    }
    if wrong := [key for key, value in inside.items() if sidecar.get(key) != value]:
        raise UserError(
            f"{artefact.sidecar_path} does not describe {path} ({', '.join(wrong)}); copy both again, or export again"
        )
    return artefact


def build_engine(onnx_file: Artefact, settings: Settings) -> Built:
    """Build, and check that what the file quantises runs quantised.

    Raises `UserError` for what TensorRT refuses, `PrecisionError` for an engine of another precision.
    """
    built = build(onnx_file.content, settings.flavour, settings.profile, settings.targets)
    precision = onnx_file.sidecar["precision"]
    if precision in QUANTISED and built.layers:  # where none are listed, the report says that nothing is known
        other = unquantised(onnx.load_from_string(onnx_file.content), built.layers, QUANTISED[precision])
        if other:
            some = ", ".join(other[:4]) + (", ..." if other[4:] else "")
            raise PrecisionError(
                f"{len(other)} layers do not run in {precision} ({some}), although the ONNX file quantises them: "
                f"{settings.flavour.title} has no such kernel for them; choose another --target or --precision"
            )
    return built


def unquantised(model: onnx.ModelProto, layers: tuple[Layer, ...], dtype: str) -> list[str]:
    """The convolutions and products with quantised operands in the file that no layer of the engine runs as such."""
    dequantised = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    wanted = [
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[0] in dequantised
    ]
    seen = {name for layer in layers if layer.inputs and layer.inputs[0].dtype == dtype for name in layer.onnx}
    return [name for name in wanted if name not in seen]


def describe(onnx_file: Artefact, path: Path, built: Built, settings: Settings) -> Artefact:
    """The engine as it will be written; its sidecar's ``parity`` is None until it has run."""
    how = (settings.flavour, settings.profile, settings.targets)
    return Artefact(path, built.content, sidecar_path(path), describe_engine(onnx_file.sidecar, path, built, *how))


def engine_parity(
    engine: Artefact, onnx_file: Artefact, settings: Settings, images: np.ndarray, tolerance: float | None
) -> tuple[list[Run], str]:
    """Compare the engine on the GPU with its ONNX file in ONNX Runtime, at the profile's batches; `ParityError`.

    Returns the runs, and by what the file was run.
    """
    from rd_deploy.trt.session import Session

    precision, profile = onnx_file.sidecar["precision"], settings.profile
    reference = _reference(onnx_file.content, precision, profile.maximum)
    with Session(engine_file(engine.path, engine.content, engine.sidecar)) as session:
        ways = [
            Way(settings.flavour.title, batch, lambda batch=batch: whole_batches(session.run, batch))
            for batch in sorted({profile.minimum, profile.optimum, profile.maximum})
        ]
        margin = CLEAR_MARGINS[precision]
        run = reference.load()

        def expected(images: np.ndarray) -> np.ndarray:
            return in_batches(run, images, min(profile.maximum, REFERENCE_BATCH))

        runs = compare_ways(expected, ways, images, profile.maximum, tolerance, margin)
    return runs, reference.engine


def _reference(content: bytes, precision: str, batch: int) -> Way:
    """How an ONNX file is run to be compared with: as literally as ONNX Runtime can on a CPU."""
    if precision in QUANTISED:
        return Way("onnxruntime, Q/DQ computed literally", batch, lambda: onnx_runner(content, literal=True))
    return onnx_ways(content, precision, batch)[-1]  # in half precision the one whose activations are rounded
