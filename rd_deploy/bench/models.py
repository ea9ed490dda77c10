"""What can be benched: our architectures, a checkpoint, an ONNX file, torchvision's and timm's networks.

Whatever it is, it becomes one ONNX model that every engine reads.
"""

import hashlib
import importlib.util
import math
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import onnx

from rd_deploy.common import UserError, expanded, first_line, nearest, require
from rd_deploy.engines.base import image_shape
from rd_deploy.export.onnx import KEY, read_metadata, to_onnx
from rd_deploy.onnx_files import load_model

MAX_ELEMENTS = 1 << 30  # of a batch of images: 4 GiB in fp32; 4,096 images of 3x224x224 are 0.6 of it


@dataclass(frozen=True)
class Subject:
    """A network to bench. ``shape``: (C, H, W); ``arch``: the fields of our `Arch`, None for a foreign network.

    ``is_file``: it comes from an ONNX file, ours or of others.
    """

    name: str
    source: str
    model: onnx.ModelProto
    arch: dict | None = None
    is_file: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return image_shape(self.model)

    @property
    def sha256(self) -> str:
        """Of the network as ONNX, with its weights: two files called model.onnx are told apart by it."""
        return hashlib.sha256(self.model.SerializeToString(deterministic=True)).hexdigest()

    @property
    def classes(self) -> int | None:
        """Logits per image, None if the file does not say."""
        dims = self.model.graph.output[0].type.tensor_type.shape.dim
        return (dims[-1].dim_value or None) if dims else None


def load_subject(text: str, like: Subject | None = None, size: int | None = None, seed: int = 0) -> Subject:
    """The network a user names: an architecture, ``model.pt``, ``model.onnx``, ``torchvision:NAME``, ``timm:NAME``.

    ``like``: a named network takes its input shape and classes (and, if ours, its stem and width) from that one.
    ``size``: pixels of a named network's images; a file has its own. Raises `UserError`.
    """
    if not text.strip():
        raise UserError("an empty name is no network: give an architecture such as plain50, a model.pt or a model.onnx")
    suffix = Path(text).suffix.lower()
    if suffix == ".onnx":
        return _onnx_file(str(expanded("the network", text)), size)
    if suffix == ".pt":
        return _checkpoint(str(expanded("the network", text)), size)
    library, colon, name = text.partition(":")
    if colon and library in LIBRARIES:
        return _foreign(library, name, like, size, seed)
    if colon:
        raise UserError(f"unknown library '{library}' in '{text}'{nearest(library, LIBRARIES)}")
    return _named(text, like, size, seed)


def counterpart(subject: Subject) -> str:
    """The default of ``--compare``: the ResNet of one of our networks, resnet50 for torchvision's and timm's.

    Raises `UserError` for an ONNX file of others: there is no knowing what it should be compared with.
    """
    if subject.arch is not None:
        return f"resnet{subject.arch['depth']}"
    if subject.is_file:
        raise UserError(f"{subject.source} was not made by rd-export: name what to compare it with, --compare MODEL")
    return "resnet50"


def check_comparable(model: Subject, compare: Subject, batch: int = 1) -> None:
    """Two networks are comparable when they take the same images and give as many logits.

    Raises `UserError` for others, and when a ``batch`` of images is larger than is ever held in memory.
    """
    for subject in (model, compare):
        _check_elements(subject, batch)
    if model.shape != compare.shape:
        raise UserError(
            f"{model.name} takes images {model.shape}, {compare.name} {compare.shape} (channels, height, width): "
            "compare networks of one input shape, or name an architecture after --compare"
        )
    if None not in (model.classes, compare.classes) and model.classes != compare.classes:
        raise UserError(f"{model.name} has {model.classes} classes, {compare.name} {compare.classes}: not comparable")


def _check_elements(subject: Subject, batch: int) -> None:
    if batch * math.prod(subject.shape) > MAX_ELEMENTS:
        images = "x".join(map(str, subject.shape))
        raise UserError(
            f"{subject.name} takes images {images}: a batch of {batch} has more than {MAX_ELEMENTS:,} values; "
            "use smaller images or a smaller --batch"
        )


def _onnx_file(path: str, size: int | None) -> Subject:
    """An ONNX file; one of ours says in its metadata which architecture it is."""
    model = load_model(path)
    onnx.load_external_data_for_model(model, str(Path(path).resolve().parent))  # `load_model` checked where they lie
    arch = _own_arch(model, path) if _is_ours(model) else None
    subject = Subject(Path(path).stem, f"ONNX file {path}", model, arch, is_file=True)
    _check_size(subject, size)
    _check_elements(subject, 1)
    return subject


def _is_ours(model: onnx.ModelProto) -> bool:
    return any(entry.key.startswith(KEY) for entry in model.metadata_props)


def _own_arch(model: onnx.ModelProto, path: str) -> dict:
    """The architecture of an fp32 export, of which engines make the other precisions themselves.

    The part of it that decides what to compare with is checked, without torch: files may be damaged.
    """
    known = read_metadata(model)
    if known.precision != "fp32":
        raise UserError(
            f"ONNX file {path} is the {known.precision} export; give the fp32 one: --precision sets what is run"
        )
    kinds = {"depth": int, "stem": str, "width": (int, float)}
    if not all(isinstance(known.arch.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"ONNX file {path}: its metadata names no architecture; export it again")
    return known.arch


def _checkpoint(path: str, size: int | None) -> Subject:
    require("torch", "train")
    from rd_deploy.export.source import source_from_checkpoint

    source = source_from_checkpoint(path)
    name = f"{source.checkpoint.arch.name} ({Path(path).name})"
    arch = source.checkpoint.arch.to_dict()
    subject = Subject(name, f"checkpoint {path}", to_onnx(source.chain), arch)
    _check_size(subject, size)
    return subject


def _check_size(subject: Subject, size: int | None) -> None:
    if size is not None and subject.shape[1:] != (size, size):
        raise UserError(
            f"{subject.source} takes {subject.shape[1]}x{subject.shape[2]} images: leave --size {size} away"
        )


def _named(name: str, like: Subject | None, size: int | None, seed: int) -> Subject:
    require("torch", "train")
    from rd_train.networks import ARCH_NAMES

    if name in ARCH_NAMES:
        return _architecture(name, like, size, seed)
    known = list(ARCH_NAMES)
    for library, names in LIBRARIES.items():
        found = names()
        if name in found:
            return _foreign(library, name, like, size, seed)
        known += found
    if Path(name).exists():  # asked last: a folder may be named like a network
        raise UserError(f"{name} is neither a .pt checkpoint nor an .onnx file")
    hint = nearest(name, known)
    raise UserError(f"unknown network '{name}'{hint if 'did you mean' in hint else nearest(name, ARCH_NAMES)}")


def _architecture(name: str, like: Subject | None, size: int | None, seed: int) -> Subject:
    from rd_deploy.export.source import source_from_name

    changes = {}
    if like is not None:
        size = _square(like)
        changes = {"in_channels": like.shape[0]} | ({"classes": like.classes} if like.classes else {})
        if like.arch is not None:
            changes |= {field: like.arch[field] for field in ("stem", "width")}
    source = source_from_name(name, size, seed, **changes)
    model = to_onnx(source.chain)
    return Subject(name, f"architecture {name}, random weights (seed {seed})", model, source.network.arch.to_dict())


def _square(like: Subject) -> int:
    _, height, width = like.shape
    if height != width:
        raise UserError(f"{like.name} takes {height}x{width} images; named architectures are built for square ones")
    return height


def _foreign(library: str, name: str, like: Subject | None, size: int | None, seed: int) -> Subject:
    """A torchvision or timm network with random weights and calibrated BN, exported by torch."""
    torch = require("torch", "train")
    package = require(library, "train" if library == "torchvision" else "timm")
    names = LIBRARIES[library]()
    if name not in names:
        raise UserError(f"{library} has no network '{name}'{_close(name, names)}")
    channels, size = (like.shape[0], _square(like)) if like is not None else (3, size or 224)
    if channels != 3:
        raise UserError(f"{library}'s {name} takes 3 channels, {like.name} {channels}: name one of our architectures")
    classes = (like.classes if like is not None else None) or 1000
    create = package.models.get_model if library == "torchvision" else package.create_model
    options = {"weights": None} if library == "torchvision" else {"pretrained": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = create(name, **options, num_classes=classes)
            _calibrate(network, size)
        except Exception as error:  # whatever a foreign network raises, mostly because of the size
            reason = first_line(error)
            raise UserError(f"{library}:{name} cannot run {size}x{size} images ({reason}): choose --size") from error
    model = _torch_export(network.eval(), size, f"{library}:{name}")
    return Subject(name, f"{library} {name}, random weights (seed {seed})", model)


def _close(name: str, names: list[str]) -> str:
    hint = nearest(name, names)
    return hint if "did you mean" in hint else f"; it has {len(names)} others"


def _calibrate(network, size: int) -> None:
    """Give every BN the statistics of random images, so that activations neither vanish nor explode."""
    import torch

    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a cumulative average: after one batch, that batch's statistics
    with torch.no_grad():
        network.train()(torch.randn(4, 3, size, size))


def _torch_export(network, size: int, name: str) -> onnx.ModelProto:
    """torch's TorchScript exporter, traced at batch 2 with a free batch: it needs no further package."""
    import torch

    images = torch.randn(2, 3, size, size)
    free = {"images": {0: "batch"}, "logits": {0: "batch"}}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder) / "model.onnx")
        names = {"input_names": ["images"], "output_names": ["logits"]}
        try:
            torch.onnx.export(network, (images,), path, dynamo=False, dynamic_axes=free, opset_version=17, **names)
        except Exception as error:  # whatever a foreign network makes the exporter raise
            advice = "export it yourself, give the file"
            raise UserError(f"torch cannot export {name} to ONNX ({first_line(error)}): {advice}") from error
        return load_model(path)


def _library(name: str, extra: str) -> ModuleType | None:
    """None where it is not installed; a `UserError` where it is, and cannot be imported."""
    return require(name, extra) if importlib.util.find_spec(name) else None


def _torchvision_names() -> list[str]:
    torchvision = _library("torchvision", "train")
    return torchvision.models.list_models(module=torchvision.models) if torchvision else []


def _timm_names() -> list[str]:
    timm = _library("timm", "timm")
    return timm.list_models() if timm else []


LIBRARIES = {"torchvision": _torchvision_names, "timm": _timm_names}
