"""The compiled engine: runs .rdp files on CPUs, with NumPy and nothing else. `Session` is all that most need."""

from rd_deploy.native.library import Unsupported
from rd_deploy.native.session import (
    Context,
    Flag,
    Network,
    NetworkInfo,
    Plan,
    PlanInfo,
    Session,
    StepInfo,
    aligned_empty,
    available_isas,
    measure_product,
    measure_read,
    version,
)

__all__ = [
    "Context",
    "Flag",
    "Network",
    "NetworkInfo",
    "Plan",
    "PlanInfo",
    "Session",
    "StepInfo",
    "Unsupported",
    "aligned_empty",
    "available_isas",
    "measure_product",
    "measure_read",
    "version",
]
