"""The two TensorRTs behind one interface: enterprise TensorRT (10.x, 11) and TensorRT-RTX.

Their Python modules offer the same classes. What one of them lacks is found out by ``hasattr``, never by a version.
"""

from dataclasses import dataclass
from types import ModuleType

from rd_deploy.common import UserError, install_hint, nearest, require

MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}  # also the names of the extras
TITLES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}


@dataclass(frozen=True)
class Flavour:
    """One of `MODULES`, imported. ``name``: ``tensorrt`` or ``rtx``."""

    name: str
    module: ModuleType

    @property
    def version(self) -> str:
        """The module's own version, such as ``1.7.1.116``."""
        return self.module.__version__

    @property
    def title(self) -> str:
        """For messages: ``TensorRT-RTX 1.7.1.116``."""
        return f"{TITLES[self.name]} {self.version}"


def context_bytes(engine) -> int | None:
    """Device memory of an execution context, by the name that this TensorRT has for it; None when it has none."""
    names = ("device_memory_size_v2", "device_memory_size")
    return next((getattr(engine, name) for name in names if hasattr(engine, name)), None)


def load_flavour(name: str) -> Flavour:
    """Import a flavour; an unknown name, and one that is not installed, is a `UserError`."""
    if name not in MODULES:
        raise UserError(f"unknown TensorRT flavour '{name}'{nearest(name, MODULES)}")
    return Flavour(name, require(MODULES[name], name))


def choose_flavour(name: str, gpu: bool) -> Flavour:
    """``auto``: enterprise TensorRT where it is installed and there is a GPU to build on, else TensorRT-RTX.

    Any other name is `load_flavour`'s. Nothing installed that could build here is a `UserError`.
    """
    if name != "auto":
        return load_flavour(name)
    reasons = []
    for candidate in ("tensorrt", "rtx") if gpu else ("rtx",):
        try:
            return load_flavour(candidate)
        except UserError as reason:
            reasons.append(str(reason))
    raise UserError(
        f"no TensorRT that can build here: {reasons[-1]} (TensorRT-RTX builds without a GPU){_enterprise(gpu)}"
    )


def _enterprise(gpu: bool) -> str:
    return f", or {install_hint('tensorrt')}" if gpu else ""
