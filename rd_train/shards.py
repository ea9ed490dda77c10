"""WebDataset shards: tars of KEY.jpg beside KEY.cls (or KEY.json), indexed once, then read by offset in any order.

Free of torch, like `rd_train.decode`: worker processes index the tars.
"""

import json
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rd_deploy.common import UserError, check_file
from rd_train.decode import MAX_BYTES, SUFFIXES
from rd_train.listing import Listing
from rd_train.workers import Workers

ROLES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
FOLDERS = ("", *ROLES)
IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
MOST_MEMBERS, MOST_CLASSES = 2_000_000, 1_000_000
LABEL_BYTES, JSON_BYTES = 32, 1 << 20
ZEROS = bytes(tarfile.BLOCKSIZE)  # how a tar ends


@dataclass
class Shard:
    """The samples of a tar: names of the image members, labels, and (offset, length) of each."""

    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class _Sample:
    image: str | None = None
    span: tuple[int, int] = (0, 0)
    label: int | None = None
    from_json: int | None = None


def index_shard(path: str) -> Shard:
    """Names, labels and places of a tar's images; its members' data are not read, but for labels.

    A sample is the members with the same KEY, the path up to the first dot of its last part. Other members than the
    image, ``cls`` and ``json`` are left alone.
    """
    samples: dict[str, _Sample] = {}
    check_file(path, "shard", max_bytes=1 << 50)
    try:
        with tarfile.open(path, "r:") as tar:
            for count, member in enumerate(_members(tar, path)):
                if count >= MOST_MEMBERS:
                    raise UserError(f"shard {path} has more than {MOST_MEMBERS:,} members; split it")
                _add(samples, tar, member, path)
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"shard {path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # of a hostile header, tarfile raises anything
        raise UserError(
            f"shard {path} is not an uncompressed tar, or is damaged ({error}); decompress or copy it again"
        ) from error
    shard = Shard()
    for key, sample in samples.items():
        label = sample.label if sample.label is not None else sample.from_json
        if sample.image is None or label is None:
            lacks = "no image" if sample.image is None else "neither .cls nor a .json with a whole number 'label'"
            raise UserError(f"shard {path}: sample {key} has {lacks}; make the shard again")
        shard.names.append(sample.image)
        shard.labels.append(label)
        shard.spans.append(sample.span)
    return shard


def _members(tar: tarfile.TarFile, path: str):
    """The members, one at a time; a tar that is cut short or damaged, which tarfile takes for its end, is an error."""
    before = -1
    while (member := tar.next()) is not None:
        if tar.offset <= before:  # a negative size
            raise UserError(f"shard {path} is damaged after {before:,} bytes; copy it again")
        yield member
        before = tar.offset
        tar.members.clear()  # which tarfile would keep
    with Path(path).open("rb") as file:
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != ZEROS:
            raise UserError(f"shard {path} is cut short or damaged after {tar.offset:,} bytes; copy it again")


def _add(samples: dict[str, _Sample], tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    folder, slash, base = member.name.rpartition("/")
    stem, _, kind = base.partition(".")
    kind = kind.lower()
    if member.isdir() or not stem:
        return
    if not member.isreg() or member.issparse():
        raise UserError(f"shard {path}: {member.name[:200]} is a link or a device, not a file; make the shard again")
    if kind not in (*IMAGES, "cls", "json"):
        return
    sample = samples.setdefault(folder + slash + stem, _Sample())
    if kind == "cls":
        sample.label = _class_number(tar, member, path)
    elif kind == "json":
        sample.from_json = _json_label(tar, member)
    elif sample.image is not None:
        raise UserError(f"shard {path}: sample {stem} has two images ({sample.image}, {member.name})")
    elif not 0 <= member.size <= MAX_BYTES:
        raise UserError(f"shard {path}: {member.name[:200]} has {member.size:,} bytes, more than {MAX_BYTES:,}")
    else:
        sample.image, sample.span = member.name, (member.offset_data, member.size)


def _class_number(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> int:
    text = tar.extractfile(member).read().strip() if 0 < member.size <= LABEL_BYTES else b""
    if not re.fullmatch(rb"[0-9]{1,7}", text) or int(text) >= MOST_CLASSES:
        raise UserError(f"shard {path}: {member.name[:200]} is not a class number from 0 to {MOST_CLASSES - 1:,}")
    return int(text)


def _json_label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int | None:
    """The "label" of a JSON object, or None where there is no such number."""
    if not 0 < member.size <= JSON_BYTES:
        return None
    try:
        values = json.loads(tar.extractfile(member).read())
    except (ValueError, RecursionError):
        return None
    label = values.get("label") if isinstance(values, dict) else None
    return label if type(label) is int and 0 <= label < MOST_CLASSES else None


def find_shards(root: Path) -> list[str]:
    """The tars in ``root`` and in its folders with the names of `ROLES`, relative to it, sorted."""
    found = sorted(str(path.relative_to(root)) for folder in FOLDERS for path in (root / folder).glob("*.tar"))
    if found:
        return found
    if any(path.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2")) for path in root.iterdir()):
        raise UserError(f"{root} holds compressed tars, in which nothing can be found by its place; decompress them")
    raise UserError(f"{root} holds no shards (*.tar), nor do train, val or test in it; give their folder: --data-dir")


def role_of(shard: str) -> int | None:
    """0, 1, 2: whether a shard is for training, validation or test, by the words in its name, or its folder's."""
    for part in reversed(Path(shard).with_suffix("").parts):
        roles = {ROLES[word] for word in re.split("[^a-z]+", part.lower()) if word in ROLES}
        if roles:
            return roles.pop() if len(roles) == 1 else None
    return None


def shard_layout(root: Path, workers: Workers) -> tuple[list[str], list[Listing]]:
    """Class names and train, validation and test images of shards, as the webdataset library writes them.

    Which shard is for what says its name or folder: ``imagenet1k-train-0000.tar``, ``val/000.tar``. Without one of
    validation and test, a tenth of the training images validates; without such names, all are divided 80/10/10. Images
    are divided by a hash of their KEY. Class names are the lines of ``classes.txt``, or the numbers themselves.
    """
    shards = find_shards(root)
    roles = [role_of(shard) for shard in shards]
    if None in roles and set(roles) != {None}:
        unclear = shards[roles.index(None)]
        raise UserError(f"{root}: shard {unclear} says not whether it is for train, val or test; rename or move it")
    indexed = workers.map(index_shard, [str(root / shard) for shard in shards])
    everything = _listing(root, shards, indexed)
    keys = [name.rpartition("/")[2].partition(".")[0] for shard in indexed for name in shard.names]
    if set(roles) == {None}:
        parts = everything.divide((0.8, 0.9), keys)
    else:
        parts = _by_role(root, everything, np.repeat(roles, [len(shard.names) for shard in indexed]), keys)
    return _class_names(root, parts[0].labels), parts


def _listing(root: Path, shards: list[str], indexed: list[Shard]) -> Listing:
    files = [f"{shard}/{name}" for shard, found in zip(shards, indexed, strict=True) for name in found.names]
    labels = np.array([label for shard in indexed for label in shard.labels], np.int64)
    places = [(number, *span) for number, shard in enumerate(indexed) for span in shard.spans]
    return Listing(root, files, labels, shards, np.array(places, np.int64).reshape(-1, 3))


def _by_role(root: Path, everything: Listing, role: np.ndarray, keys: list[str]) -> list[Listing]:
    train, *others = (np.flatnonzero(role == number) for number in range(3))
    given = [everything.select(chosen) for chosen in others if len(chosen)]
    if not len(train) or not given:
        raise UserError(f"{root} has shards of {'no' if not len(train) else 'only'} training images; add the others")
    own = everything.select(train)
    return [*(own.divide((0.9,), [keys[index] for index in train]) if len(given) == 1 else [own]), *given]


def _class_names(root: Path, labels: np.ndarray) -> list[str]:
    count = int(labels.max(initial=-1)) + 1
    path = root / "classes.txt"
    if not path.exists():
        return [str(number) for number in range(count)]
    text = check_file(path, "class names", max_bytes=1 << 24).read_text(encoding="utf-8", errors="replace")
    names = [line.strip() for line in text.splitlines()]
    if "" in names or len(set(names)) < len(names) or len(names) < count:
        raise UserError(f"{path} must name {count} or more classes, each once, one a line; it has {len(names)} lines")
    return names
