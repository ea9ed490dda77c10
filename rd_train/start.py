"""What a fine-tuning starts from: a ``model.pt``, or a published ResNet by its name or in a file of its weights."""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rd_deploy.common import UserError
from rd_train.checkpoint import Checkpoint, check_state, load_checkpoint, load_plain, load_strictly
from rd_train.encoded import IMAGENET_MEAN, IMAGENET_STD, encoded_preprocessing
from rd_train.names import is_name
from rd_train.networks import IMAGENET_DEPTHS, Arch, Network, parse_arch
from rd_train.recipe import Recipe, defaults
from rd_train.teachers import checked_state, fetch, look_up, parse_published, read_state, with_counters


def load_start(start: str) -> Checkpoint:
    """The network to fine-tune, as a ``model.pt`` would hold it; anything else is a `UserError`.

    A published ResNet, by its name or as the file of its weights with torchvision's names, counts as trained on images
    of 224 pixels, and the file's as normalised by ImageNet's statistics.
    """
    what, statistics = f"start_weights {start}", (IMAGENET_MEAN, IMAGENET_STD)
    if is_name(start):
        published = parse_published(start, "start_weights")
        record = look_up(published)
        state, statistics = fetch(published, record), (tuple(record.mean), tuple(record.std))
    elif Path(start).suffix == ".safetensors":
        state = read_state(start, "start_weights")
    else:
        values = load_plain(start, "start_weights")
        if isinstance(values, dict) and "format" in values:
            return load_checkpoint(start)  # or what is wrong with it
        state = checked_state(start, values, "start_weights")
    arch = _arch_of(state, what)
    with torch.device("meta"):  # shapes without memory
        own = Network(arch).state_dict()
    state = with_counters(own, state)
    check_state(own, state, f"{what} (as {arch.name})")
    preprocessing = replace(encoded_preprocessing(None, None), mean=statistics[0], std=statistics[1])
    return Checkpoint(arch, state, preprocessing, [f"class {number}" for number in range(arch.classes)])  # of no data


def _arch_of(state: dict[str, Tensor], what: str) -> Arch:
    """The ResNet with as many blocks of this kind; whether its weights fit, loading them says."""
    found = {tuple(name.split(".")[:2]) for name in state if re.fullmatch(r"layer\d\.\d+\.bn1\.weight", name)}
    counts = Counter(stage for stage, _ in found)
    blocks = tuple(counts[f"layer{number}"] for number in range(1, 5))
    kind = "bottleneck" if "layer1.0.conv3.weight" in state else "basic"
    classifier = state.get("fc.weight")
    known = {IMAGENET_DEPTHS[depth]: depth for depth in IMAGENET_DEPTHS}
    if (kind, blocks) not in known or classifier is None or classifier.ndim != 2:
        names = ", ".join(f"resnet{depth}" for depth in IMAGENET_DEPTHS)
        raise UserError(f"{what} is neither a model.pt nor the state_dict of one of {names} with torchvision's names")
    return parse_arch(f"resnet{known[kind, blocks]}", classes=len(classifier))


def from_start(recipe: Recipe, named: Collection[str] = ()) -> Recipe:
    """The recipe with the architecture of its ``start_weights``; another one asked for is a `UserError`.

    Asked for is what differs from the defaults of `Recipe`, and entries that are ``named`` (by a preset, say).
    """
    arch = load_start(recipe.start_weights).arch
    kind = "resnet" if arch.shortcuts == "all" else "plain"
    own = {"arch": f"{kind}{arch.depth}", "shortcuts": arch.shortcuts, "stem": arch.stem}
    own |= {"width": float(arch.width), "reparam": arch.reparam}
    usual = defaults(vars(recipe))
    for name, value in own.items():
        given = getattr(recipe, name)
        if given is not None and given != value and (name in named or given != usual[name]):
            raise UserError(
                f"{name}={given}, but the network of {recipe.start_weights} has {name}={value}; leave {name} away "
                "(the preset finetune names none)"
            )
    if "kd_weight" not in named and recipe.kd_weight == usual["kd_weight"]:
        own["kd_weight"] = None  # goes by the depth
    return replace(recipe, **own)


def keeps_classifier(checkpoint: Checkpoint, classes: list[str]) -> bool:
    """Whether a training on these classes goes on with the checkpoint's own classifier: they are its own."""
    return checkpoint.classes == classes


def start_from(checkpoint: Checkpoint, arch: Arch, classes: list[str]) -> Network:
    """A network with the checkpoint's weights; with a new classifier, unless it knows just these classes."""
    network = Network(arch)
    state = checkpoint.state_dict
    if not keeps_classifier(checkpoint, classes):
        fresh = {name: value for name, value in network.state_dict().items() if name.startswith("fc.")}
        state = {**state, **fresh}
    load_strictly(network, state, "start_weights")
    return network
