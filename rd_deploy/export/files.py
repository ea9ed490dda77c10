"""What every exporter shares: a model's file and its JSON sidecar, of which both are written or neither."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rd_deploy.chain import INPUT, Chain
from rd_deploy.common import UserError, atomic_path, check_file, check_replaceable

SIDECAR_FORMAT = "residual-distillation-sidecar/1"
MAX_SIDECAR_BYTES = 256 << 20  # a million class names and more
OUTPUT = "logits"


@dataclass(frozen=True)
class Artefact:
    """A model's file that is ready to be written, and what its sidecar will say."""

    path: Path
    content: bytes
    sidecar_path: Path
    sidecar: dict

    @property
    def sha256(self) -> str:
        """Of the file's bytes, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()


def check_target(path: Path, suffix: str, sidecar: Path) -> None:
    """Raise `UserError` unless ``path`` ends in ``suffix``, both files can be written and neither replaces others'.

    A model is ours by its sidecar. Meant to be called before the work is done.
    """
    if path.suffix != suffix:
        raise UserError(f"output {path} must end in {suffix}")
    for target in (path, sidecar):
        check_replaceable(target)
    for target in {os.path.realpath(path), os.path.realpath(sidecar)}:  # where links lead
        check_place(Path(target).parent, path, "choose another output path")
    _check_sidecar(sidecar)
    if path.exists() and not sidecar.exists():
        raise UserError(f"{path} exists and is not of rd-export (no {sidecar.name}); move it, or choose another --out")


def check_place(folder: Path, what: Path, advice: str) -> None:
    """Raise `UserError` unless files can be written to ``folder``, an absolute path which need not exist yet.

    ``what``: the output that the message is about.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"cannot write {what}: {existing} is not a folder; {advice}")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"cannot write {what}: {error.strerror or error}; {advice}") from error


def _check_sidecar(path: Path) -> None:
    """Refuse to replace a JSON file that is not a sidecar, such as a training's results."""
    if not path.exists():
        return
    values = None
    with contextlib.suppress(OSError):
        values = sidecar_values(path)
    if values is None:
        raise UserError(f"{path} exists and is not a sidecar of rd-export; move it, or choose another output path")


def sidecar_values(path: Path) -> dict | None:
    """What stands in a file that may be a sidecar; None when it is none of ours."""
    if not path.is_file() or path.stat().st_size > MAX_SIDECAR_BYTES:
        return None
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and values.get("format") == SIDECAR_FORMAT else None


def read_sidecar(path: Path, kinds: dict[str, type]) -> dict:
    """A sidecar's values, with these entries of these types. Raises `UserError` for anything else."""
    path = check_file(path, "sidecar", MAX_SIDECAR_BYTES)
    values = sidecar_values(path)
    if values is None:
        raise UserError(f"{path} is not a sidecar of rd-export; export the model again")
    if wrong := [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]:
        raise UserError(f"{path} lacks {', '.join(wrong)}; export the model again")
    return values


def write_artefacts(artefacts: Sequence[Artefact]) -> None:
    """Write models and sidecars; each replaces an older one atomically, and none does when one cannot be written."""
    with contextlib.ExitStack() as stack:
        for artefact in artefacts:
            text = json.dumps(artefact.sidecar, indent=2, allow_nan=False) + "\n"
            stack.enter_context(atomic_path(artefact.path)).write_bytes(artefact.content)
            stack.enter_context(atomic_path(artefact.sidecar_path)).write_text(text, encoding="utf-8")


def make_artefact(
    path: Path,
    sidecar: Path,
    content: bytes,
    chain: Chain,
    precision: str,
    verify: Callable[[bytes], dict] | None,
    particular: dict,
    packages: Sequence[str],
) -> Artefact:
    """A model's file of a chain, ready to be written to ``path``, and its sidecar (see `describe`).

    ``verify`` gets the file's bytes; what it returns becomes the sidecar's ``parity``, and it may raise.
    """
    parity = None if verify is None else verify(content)
    values = describe(path.name, content, chain, precision, parity, particular, packages)
    return Artefact(path, content, sidecar, values)


def describe(
    file_name: str,
    content: bytes,
    chain: Chain,
    precision: str,
    parity: dict | None,
    particular: dict,
    packages: Sequence[str],
) -> dict:
    """The sidecar: what is known about a model's file, as plain containers; ``sha256`` ties it to the file's bytes.

    ``particular``: what only this kind of file has. ``packages``: those whose versions may have mattered.
    """
    return {
        "format": SIDECAR_FORMAT,
        "model": file_name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "name": chain.name,
        "precision": precision,
        **tensors(chain.input_shape, len(chain.classes)),
        **particular,
        "preprocessing": chain.preprocessing.to_dict(),
        "classes": list(chain.classes),
        "arch": chain.arch,
        "macs": chain.macs(),
        "parameters": chain.parameters(),
        "weights_sha256": chain.sha256(),
        "parity": parity,
        "provenance": chain.provenance,
        "versions": _versions(packages),
    }


def tensors(image_shape: Sequence[int], classes: int) -> dict[str, dict]:
    """What every exported model takes and gives. ``image_shape``: (C, H, W)."""
    return {
        "input": {"name": INPUT, "dtype": "float32", "shape": ["batch", *image_shape]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["batch", classes]},
    }


def _versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of packages; None for what is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
