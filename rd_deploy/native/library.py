"""The compiled engine's C interface (include/rd.h) by ctypes: its structures, its functions, its errors."""

import ctypes
import sys
from ctypes import POINTER, c_char_p, c_double, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import fields
from functools import cache
from pathlib import Path

from rd_deploy.common import UserError

VERSION = "0.1.0"  # of the interface below: a library of another version is refused
PATH = Path(__file__).resolve().parent / ("librd.dylib" if sys.platform == "darwin" else "librd.so")
REBUILD = "in the checkout: python rd_deploy/native/build.py; elsewhere install the package again"
OK, UNSUPPORTED, NO_MEMORY = 0, 4, 5  # of rd_status; the others are mistakes in the input


class Unsupported(UserError):
    """This CPU or this network cannot do what was asked; the message is one line."""


class CNetworkInfo(ctypes.Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("channels", "height", "width", "classes", "steps")),
        ("weight_bytes", c_uint64),
        ("name", c_char_p),
        ("precision", c_char_p),
    )


class COptions(ctypes.Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("batch", "threads", "height", "width", "flags")),
        ("isa", c_char_p),
    )


class CPlanInfo(ctypes.Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("batch", "threads", "channels", "height", "width", "classes", "steps")),
        *((f"{name}_bytes", c_uint64) for name in ("arena", "feature_map", "scratch", "alignment", "weight", "packed")),
        ("macs", c_uint64),
        ("isa", c_char_p),
    )


class CStepInfo(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("kernel", c_char_p),
        *((name, c_uint64) for name in ("macs", "flops", "weight_bytes", "map_bytes", "live_bytes")),
    )


# Arguments of every function that returns an rd_status.
CHECKED = {
    "rd_network_load": (c_char_p, POINTER(c_void_p)),
    "rd_network_from_memory": (c_void_p, c_size_t, POINTER(c_void_p)),
    "rd_network_get_info": (c_void_p, POINTER(CNetworkInfo)),
    "rd_plan_create": (c_void_p, POINTER(COptions), POINTER(c_void_p)),
    "rd_plan_get_info": (c_void_p, POINTER(CPlanInfo)),
    "rd_plan_get_step": (c_void_p, c_uint32, POINTER(CStepInfo)),
    "rd_context_create": (c_void_p, c_void_p, c_size_t, POINTER(c_void_p)),
    "rd_context_run": (c_void_p, c_void_p, c_void_p),
    "rd_context_profile": (c_void_p, c_void_p, c_void_p, c_void_p),
    "rd_measure_product": (c_char_p, c_char_p, c_uint32, POINTER(c_double)),
    "rd_measure_read": (c_size_t, c_uint32, POINTER(c_double)),
}
# Arguments and result of the others.
PLAIN = {
    "rd_version": ((), c_char_p),
    "rd_last_error": ((), c_char_p),
    "rd_available_isas": ((), c_char_p),
    "rd_network_json": ((c_void_p, POINTER(c_size_t)), c_void_p),
    "rd_network_class": ((c_void_p, c_uint32), c_char_p),
    "rd_network_free": ((c_void_p,), None),
    "rd_plan_free": ((c_void_p,), None),
    "rd_context_free": ((c_void_p,), None),
}


@cache
def library() -> ctypes.CDLL:
    """The loaded library; a `UserError` when it is missing, of another version, or for another machine."""
    return load(PATH)


def load(path: Path) -> ctypes.CDLL:
    """Load a library and declare its functions; ones with a status raise what went wrong instead of returning it."""
    if not path.exists():
        raise UserError(f"the compiled engine is not built ({path.name} is missing): {REBUILD}")
    try:
        loaded = ctypes.CDLL(str(path))
        for name, (arguments, result) in PLAIN.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, result
        version = loaded.rd_version().decode()
        if version != VERSION:
            raise UserError(f"{path.name} is version {version}, and {VERSION} is needed: {REBUILD}")
        for name, arguments in CHECKED.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype, function.errcheck = arguments, ctypes.c_int, _checker(loaded)
    except (OSError, AttributeError) as error:  # of another machine, or a function is missing
        raise UserError(f"{path.name} cannot be used here ({error}): {REBUILD}") from error
    return loaded


def _checker(loaded: ctypes.CDLL):
    def check(status: int, function, arguments) -> None:
        if status == OK:
            return
        message = loaded.rd_last_error().decode("utf-8", "replace")
        if status == NO_MEMORY:
            raise MemoryError(message)
        raise Unsupported(message) if status == UNSUPPORTED else UserError(message)

    return check


def converted(structure: ctypes.Structure, record: type):
    """A structure as the dataclass that has its fields' names; C strings become ``str``."""
    values = {entry.name: getattr(structure, entry.name) for entry in fields(record)}
    return record(**{name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()})
