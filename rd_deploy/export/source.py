"""Where the network to export comes from: a checkpoint, or an architecture's name with random weights."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from rd_deploy.chain import Chain
from rd_deploy.common import UserError
from rd_deploy.fold import fold
from rd_deploy.random_weights import random_network
from rd_train.checkpoint import Checkpoint, load_checkpoint
from rd_train.names import is_name
from rd_train.networks import Arch, Network, parameter_count, parse_arch

# 2 GiB of float32, the most one ONNX file holds.
MAX_PARAMETERS = 1 << 29
DEFAULT_SIZE = {"imagenet": 224, "small": 32}


@dataclass(frozen=True)
class Source:
    """The unfolded float32 network in evaluation mode, its chain, and the checkpoint it came from, if any."""

    network: Network
    chain: Chain
    checkpoint: Checkpoint | None = None


def source_from_name(name: str, size: int | None = None, seed: int = 0, **changes) -> Source:
    """One of our architectures with calibrated random weights; ``changes`` are fields of `Arch`.

    ``size``: pixels, by default 224 for the ImageNet stem and 32 for the small one.
    """
    arch = parse_arch(name, **changes)
    size = DEFAULT_SIZE[arch.stem] if size is None else size
    _check_buildable(arch)
    network = random_network(arch, size, seed)
    return Source(network, fold(network, size, provenance={"weights": f"random, seed {seed}"}))


def _check_buildable(arch: Arch) -> None:
    """Refuse what one ONNX file cannot hold before memory is asked for it."""
    with torch.device("meta"):  # shapes without memory
        parameters = parameter_count(Network(arch))
    if parameters > MAX_PARAMETERS:
        raise UserError(
            f"{arch.name} of width {arch.width:g} has {parameters / 1e6:,.0f} M parameters, "
            f"more than {MAX_PARAMETERS / 1e6:,.0f} M; use a smaller --width"
        )


def source_from_checkpoint(path: str | Path) -> Source:
    """The network of a ``model.pt``."""
    checkpoint = load_checkpoint(path)
    network = checkpoint.network()
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = {
        "checkpoint": Path(path).name,
        "checkpoint_sha256": digest,
        "recipe": _plain(_without_folders(checkpoint.recipe), "recipe"),
        "training": _plain(checkpoint.provenance, "provenance"),
    }
    preprocessing = checkpoint.preprocessing
    chain = fold(network, preprocessing.size, preprocessing, checkpoint.classes, provenance)
    return Source(network, chain, checkpoint)


def _without_folders(recipe: dict) -> dict:
    """The recipe with names in place of paths: where somebody keeps files does not travel with a network."""
    paths = {
        name: Path(recipe[name]).name
        for name in ("data_dir", "teacher_weights", "start_weights")
        if isinstance(recipe.get(name), str) and not is_name(recipe[name])
    }
    return {**recipe, **paths}


def _plain(values: object, what: str) -> object:
    """Values that JSON can hold, as they stand in the sidecar."""
    try:
        return json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the checkpoint's {what} holds more than plain values; train again") from error


def chain_from_name(name: str, size: int | None = None, seed: int = 0, classes: int = 1000) -> Chain:
    """The chain of one of our architectures with calibrated random weights."""
    return source_from_name(name, size, seed, classes=classes).chain
