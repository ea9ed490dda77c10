"""Names of published networks, told from paths. Free of torch and of all else that not every installation has."""

from pathlib import Path

LIBRARIES = ("torchvision", "timm")
SUFFIXES = (".pt", ".pth", ".safetensors", ".bin")  # of files of weights


def is_name(start: str) -> bool:
    """Whether this is the name of a library's network, such as ``torchvision/resnet50``, not a path."""
    path = Path(start)
    return start.partition("/")[0] in LIBRARIES and path.suffix not in SUFFIXES and not path.exists()
