"""Published ResNets as teachers, by name: ``torchvision/resnet50.IMAGENET1K_V2`` or ``timm/resnet50.a1_in1k``.

Their parameter names are ours, so that weights are loaded strictly. Only names of which the function is ours too are
taken: timm's variants differ in parts without parameters as well (anti-aliasing, pooling), which no check of weights
would notice. Nothing is unpickled: torch files are read with ``weights_only=True``, others are safetensors.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rd_deploy.common import UserError, check_file, one_line, require
from rd_deploy.preprocessing import Preprocessing
from rd_train.checkpoint import load_plain, load_strictly
from rd_train.encoded import IMAGENET_MEAN, IMAGENET_STD
from rd_train.names import LIBRARIES, SUFFIXES
from rd_train.networks import IMAGENET_DEPTHS, Arch, Network, parse_arch

MODELS = tuple(f"resnet{depth}" for depth in IMAGENET_DEPTHS)


@dataclass(frozen=True)
class Published:
    """A name in its parts: ``library/model.weights``, where the weights may be left to the library (None)."""

    library: str
    model: str
    weights: str | None

    @property
    def name(self) -> str:
        return f"{self.library}/{self.model}" + (f".{self.weights}" if self.weights else "")

    def arch(self, classes: int = 1000) -> Arch:
        """Its architecture as ours."""
        return parse_arch(self.model, classes=classes)


def is_published(name: str) -> bool:
    """Whether a teacher's name is that of a library's network."""
    return "/" in name


def parse_published(name: str, what: str = "teacher") -> Published:
    """The parts of a name; another library, or a variant that is not our ResNet, is a `UserError`."""
    library, _, rest = name.partition("/")
    model, _, weights = rest.partition(".")
    if library not in LIBRARIES and name.endswith(SUFFIXES):
        raise UserError(f"teacher '{name}' is no network's name; give a file of weights with --teacher-weights")
    if library not in LIBRARIES:
        raise UserError(f"{what} '{name}': unknown library '{library}' (known: {', '.join(LIBRARIES)})")
    if model not in MODELS:
        raise UserError(
            f"{what} '{name}' is not one of {', '.join(MODELS)} of {library}: other networks and variants (deep stem, "
            "average pooling, groups, attention) compute something else than our ResNets"
        )
    return Published(library, model, weights or None)


@dataclass(frozen=True)
class Record:
    """What a library says of weights: their name there, mean and std of their images, their classes, where they are.

    ``place``: an address for torchvision, a repository on the Hugging Face hub for timm.
    """

    weights: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int
    place: str


def settled_name(name: str) -> str:
    """The name with its weights: what is the library's default now may be another in its next version."""
    published = parse_published(name)
    return replace(published, weights=look_up(published).weights).name


def look_up(published: Published) -> Record:
    """The library's record of the weights; unknown ones, or a library that is not there, are a `UserError`."""
    return (_torchvision_record if published.library == "torchvision" else _timm_record)(published)


def load_published(name: str, weights: str | None, preprocessing: Preprocessing, classes: int) -> Network:
    """A published network in evaluation mode, from the file ``weights`` or from its library's hub.

    Images normalised otherwise than its own, or weights that are not exactly those of the architecture, are a
    `UserError`; so are weights of other than ``classes``, before they are fetched. A file whose weights the name does
    not name counts as trained on images normalised as ImageNet's.
    """
    published = parse_published(name)
    # A file needs no library, unless the name says which weights it is said to hold.
    record = look_up(published) if weights is None or published.weights else None
    statistics = (record.mean, record.std) if record else (IMAGENET_MEAN, IMAGENET_STD)
    check_statistics(f"teacher {name}", statistics, preprocessing)
    if weights is not None:
        return _network(published, f"teacher {weights}", read_state(weights))
    if record.classes != classes:
        raise UserError(
            f"teacher {name} knows {record.classes} classes, this data set has {classes}: fine-tune it on these first "
            f"(rd-train finetune {name}) and give that model.pt as --teacher-weights"
        )
    return _network(published, f"teacher {name}", fetch(published, record))


def _network(published: Published, what: str, state: dict[str, Tensor]) -> Network:
    classifier = state.get("fc.weight")
    if not isinstance(classifier, Tensor) or classifier.ndim != 2:
        raise UserError(f"{what} has no classifier fc.weight: it is no {published.model}")
    network = Network(published.arch(len(classifier)))
    load_strictly(network, with_counters(network.state_dict(), state), f"{what} (as {published.model})")
    return network.eval()


def check_statistics(what: str, statistics: tuple, preprocessing: Preprocessing) -> None:
    """Compare mean and standard deviation of a teacher's images with those that the run normalises by."""
    theirs = [float(value) for values in statistics for value in values]
    ours = [*preprocessing.mean, *preprocessing.std]
    if len(theirs) != len(ours) or not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(theirs, ours, strict=True)):
        raise UserError(f"{what} expects images normalised otherwise (mean and std {theirs}, here {ours})")


def with_counters(own: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with BN's batch counters, which torchvision's first ones lack and evaluation does not use.

    ``own``: the ``state_dict`` of the network that they are for, whose names count only.
    """
    counters = {name: torch.zeros((), dtype=torch.int64) for name in own if name.endswith("num_batches_tracked")}
    return {**counters, **state}


def read_state(path: str | Path, what: str = "teacher") -> dict[str, Tensor]:
    """A ``state_dict`` from a torch file, or from one in the safetensors format if it is called ``.safetensors``."""
    values = _read_safetensors(path, what) if Path(path).suffix == ".safetensors" else load_plain(path, what)
    return checked_state(path, values, what)


def checked_state(path: str | Path, values: object, what: str = "teacher") -> dict[str, Tensor]:
    """What was read from a file, if it is a ``state_dict``."""
    if isinstance(values, dict) and "format" in values:
        raise UserError(f"{what} {path} is a model.pt, which knows its own architecture; leave --teacher away")
    named = isinstance(values, dict) and all(isinstance(value, Tensor) for value in values.values())
    if not named or not values or not all(isinstance(name, str) for name in values):
        raise UserError(f"{what} {path} is neither a model.pt nor a state_dict of tensors; train one with --method ce")
    return values


def _read_safetensors(path: str | Path, what: str) -> dict[str, Tensor]:
    path = check_file(path, what)
    load_file = require("safetensors.torch", "timm").load_file
    try:
        return load_file(path, device="cpu")
    except Exception as error:  # a hostile file can raise anything
        raise UserError(f"{what} {path} is damaged ({one_line(error)[:80]}); make or copy it again") from error


def _torchvision_record(published: Published) -> Record:
    from torchvision.models import get_model_weights

    known = get_model_weights(published.model)
    if published.weights is not None and published.weights not in known.__members__:
        names = ", ".join(known.__members__)
        raise UserError(f"torchvision has no weights {published.weights} of {published.model} (known: {names})")
    entry = known.DEFAULT if published.weights is None else known[published.weights]
    images = entry.transforms()
    return Record(entry.name, tuple(images.mean), tuple(images.std), len(entry.meta["categories"]), entry.url)


def _timm_record(published: Published) -> Record:
    models = require("timm.models", "timm")
    tags = [name.partition(".")[2] for name in models.list_pretrained(f"{published.model}.*")]
    if published.weights is not None and published.weights not in tags:
        raise UserError(f"timm has no weights {published.weights} of {published.model} (known: {', '.join(tags)})")
    config = models.get_pretrained_cfg(".".join(filter(None, (published.model, published.weights))))
    return Record(config.tag, config.mean, config.std, config.num_classes, config.hf_hub_id)


def fetch(published: Published, record: Record) -> dict[str, Tensor]:
    """Weights from a hub: downloaded once, into torch's cache or into that of huggingface_hub, which timm brings."""
    hub = None if published.library == "torchvision" else require("huggingface_hub", "timm")
    try:
        if hub is None:  # compared with the hash that is part of the file's name
            place = record.place
            state = torch.hub.load_state_dict_from_url(place, map_location="cpu", check_hash=True, weights_only=True)
            return checked_state(published.name, state)
        path = hub.hf_hub_download(record.place, "model.safetensors")  # never the pickle that some repositories hold
    except UserError:
        raise
    except Exception as error:  # no network, no such file, a full disk, a damaged file in the cache
        reason = one_line(error)[:160] or type(error).__name__
        raise UserError(
            f"cannot fetch {published.name} ({reason}); give its file (--teacher-weights, or rd-train finetune FILE)"
        ) from error
    return read_state(path)
