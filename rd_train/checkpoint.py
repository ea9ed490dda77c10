"""The ``model.pt`` format: tensors and plain containers only, read with ``weights_only=True``, checked strictly."""

import io
import pickle
import time
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rd_deploy.common import UserError, atomic_path, check_file
from rd_deploy.preprocessing import Preprocessing
from rd_train.networks import Arch, Network

FORMAT = "residual-distillation/1"
# Of weights and counters: others torch cannot compute with (8 bits), or has no values of (complex ones, say).
KINDS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64}


@dataclass
class Checkpoint:
    """The contents of a ``model.pt``."""

    arch: Arch
    state_dict: dict[str, Tensor]
    preprocessing: Preprocessing
    classes: list[str]
    recipe: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)

    def network(self) -> Network:
        """Rebuild the network in evaluation mode, on the CPU, with exactly these weights."""
        network = Network(self.arch)
        load_strictly(network, self.state_dict, "checkpoint")
        return network.eval()


def check_state(own: dict[str, Tensor], state_dict: dict[str, Tensor], what: str) -> None:
    """Compare weights with what a network expects; whatever is missing, extra, misshapen or NaN is a `UserError`."""
    missing, extra = sorted(set(own) - set(state_dict)), sorted(set(state_dict) - set(own), key=str)
    for problem, names in (("lacks", missing), ("has extra", extra)):
        if names:
            raise UserError(
                f"{what} {problem} {', '.join(map(str, names[:3]))}{' ...' if len(names) > 3 else ''}: "
                "it is not of this architecture"
            )
    for name, tensor in own.items():
        value = state_dict[name]
        if not isinstance(value, Tensor) or value.shape != tensor.shape:
            raise UserError(
                f"{what}: {name} has shape {tuple(getattr(value, 'shape', ()))}, "
                f"the architecture needs {tuple(tensor.shape)}"
            )
        usual = value.layout == torch.strided and value.device.type in ("cpu", "cuda") and value.dtype in KINDS
        if not usual or value.is_floating_point() != tensor.is_floating_point():
            raise UserError(
                f"{what}: {name} is {value.dtype}, {value.layout}, on {value.device}; the architecture needs a dense "
                f"{tensor.dtype}"
            )
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise UserError(f"{what}: {name} repeats its values instead of holding them; it is not loaded")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{what}: {name} holds NaN or infinity; train again")
        if name.endswith("running_var") and (value < 0).any():
            raise UserError(f"{what}: {name} holds a negative variance; train again")


def load_strictly(network: torch.nn.Module, state_dict: dict[str, Tensor], what: str) -> None:
    """Load weights into a network after `check_state`."""
    check_state(network.state_dict(), state_dict, what)
    network.load_state_dict(state_dict, strict=True)


def save_plain(path: str | Path, values: dict) -> None:
    """Write tensors and plain containers atomically.

    Through memory, because torch's own writer turns a full disk into a RuntimeError about positions.
    """
    buffer = io.BytesIO()
    torch.save(values, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def plain_size(values: dict) -> int:
    """Bytes of the file that `save_plain` would write."""

    class Counter:
        count = 0

        def write(self, data: bytes) -> int:
            self.count += len(data)
            return len(data)

        def flush(self) -> None:
            pass

    counter = Counter()
    torch.save(values, counter)
    return counter.count


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write ``model.pt`` atomically."""
    save_plain(path, checkpoint_values(checkpoint))


def checkpoint_values(checkpoint: Checkpoint) -> dict:
    """What ``model.pt`` holds."""
    provenance = {
        "torch": str(torch.__version__),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **checkpoint.provenance,
    }
    return {
        "format": FORMAT,
        "arch": checkpoint.arch.to_dict(),
        "state_dict": {name: value.detach().cpu().contiguous() for name, value in checkpoint.state_dict.items()},
        "preprocessing": checkpoint.preprocessing.to_dict(),
        "classes": list(checkpoint.classes),
        "recipe": checkpoint.recipe,
        "provenance": provenance,
    }


def load_plain(path: str | Path, what: str, max_bytes: int = 4 << 30) -> object:
    """``torch.load`` of a file that may be hostile: no code runs, and any failure is a one-line `UserError`."""
    path = check_file(path, what, max_bytes)
    if path.suffix in (".onnx", ".rdp", ".engine"):
        raise UserError(f"{what} {path} is an exported network, which cannot be read back; give its model.pt")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{what} {path} is truncated, or not a torch file (a zip since torch 1.6); make it again")
    try:
        _check_members(path)
        with warnings.catch_warnings():  # torch warns of other pickle protocols; ours is the only line that is said
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        message = f"{what} {path} holds something other than tensors and plain containers; it was not loaded"
        raise UserError(message) from error
    except Exception as error:  # a hostile file can raise anything
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise UserError(f"{what} {path} is damaged ({reason}); make or copy it again") from error


def _check_members(path: Path) -> None:
    """Refuse a zip that holds more than its own size: torch writes nothing compressed, but would read it."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    if not stored or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members are compressed")


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and validate a ``model.pt``; raises `UserError` for anything that is not exactly one."""
    values = load_plain(path, "checkpoint")
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{path} is a torch file but not a {FORMAT} checkpoint; make one with rd-train")
    missing = {"arch", "state_dict", "preprocessing", "classes", "recipe", "provenance"} - set(values)
    if missing:
        raise UserError(f"checkpoint {path} lacks {', '.join(sorted(missing))}; train again")
    arch = Arch.from_dict(values["arch"])
    preprocessing = Preprocessing.from_dict(values["preprocessing"])
    classes, state = values["classes"], values["state_dict"]
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or len(classes) != arch.classes:
        raise UserError(f"checkpoint {path} must name its {arch.classes} classes")
    if preprocessing.channels != arch.in_channels:
        raise UserError(
            f"checkpoint {path}: images have {preprocessing.channels} channels, the network {arch.in_channels}"
        )
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} has no state_dict")
    with torch.device("meta"):  # shapes without memory: an absurd architecture is refused before it is built
        check_state(Network(arch).state_dict(), state, f"checkpoint {path}")
    return Checkpoint(arch, state, preprocessing, classes, values["recipe"], values["provenance"])
