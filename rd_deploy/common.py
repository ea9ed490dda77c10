"""What every command needs: one-line errors with exit code 2, atomic files, suggestions, lazy dependencies.

Free of torch, so that deploying needs none; ``rd_train`` imports it too.
"""

import argparse
import contextlib
import difflib
import errno
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

from rd_deploy.output import lasting_output

# What the system says of a place that the user chose: full, forbidden, or no place at all.
WRONG_PLACE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP),
}
# torch's allocator of the CPU, those of GPUs, ONNX Runtime's arena, and C++ as all pass it on.
NO_MEMORY = ("can't allocate memory", "out of memory", "Failed to allocate memory", "std::bad_alloc")


class UserError(Exception):
    """A mistake in the input: its message is one line saying what is wrong and what to do."""


class CheckFailed(Exception):
    """What was made is not what it should be, so that it is not written: exit code 1; the message is one line."""


class Stopped(Exception):
    """Work that ended early (a signal, a NaN loss) with everything worth keeping saved; ``code`` is the exit status."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `UserError`, and to which empty text is one."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args=None, namespace=None):
        """An unset variable of a script, say, is not an option that was left away."""
        options, unknown = super().parse_known_args(args, namespace)
        for action in self._actions:
            if getattr(options, action.dest, None) == "":
                raise UserError(
                    f"{'/'.join(action.option_strings) or action.metavar or action.dest} is empty; give a value"
                )
        return options, unknown


def run_command(name: str, command: Callable[[], int | None]) -> int:
    """Run a console command; a `UserError`, a full disk or full memory becomes one line on stderr and exit code 2.

    A reader of its output that goes away does not end it: it may have files to write (see `rd_deploy.output`).
    """
    with lasting_output():
        return _exit_code(name, command)


def _exit_code(name: str, command: Callable[[], int | None]) -> int:
    try:
        with told_of_memory():
            code = command() or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk is told of
        return code
    except UserError as error:
        print(f"{name}: error: {printable(error)}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"{name}: {printable(stop)}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except MemoryError as error:
        reason = f" ({printable(error)})" if str(error) else ""
        print(f"{name}: error: not enough memory{reason}: use smaller images or a smaller batch", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in WRONG_PLACE:
            raise
        place = printable(error.filename or "output")
        print(f"{name}: error: {error.strerror}: {place}; free space or choose another path", file=sys.stderr)
        return 2


@contextlib.contextmanager
def told_of_memory() -> Iterator[None]:
    """What libraries say when memory is full as a `MemoryError`; each has an exception of its own."""
    try:
        yield
    except (UserError, CheckFailed, Stopped, OSError, MemoryError):
        raise
    except Exception as error:
        if not any(said in str(error) for said in NO_MEMORY):
            raise
        raise MemoryError(one_line(error)[:160]) from error


def one_line(text: object) -> str:
    """An error, or any text, in one line."""
    return " ".join(str(text).split())


def first_line(error: Exception) -> str:
    """What a library's exception says, short enough for a table or for our own one-line errors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__


def printable(text: object) -> str:
    """Any text, such as a file's name, in one line that every terminal and file takes: other signs are escaped."""
    return escaped(one_line(text))


def escaped(text: str) -> str:
    """The text without what could make a terminal do anything but print it, line breaks included."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: `` (did you mean 'x'?)`` or the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(known)})"


def install_hint(extra: str | None) -> str:
    """What to type in the checkout (the package is not on an index, where its name could be anybody's)."""
    return f"in the checkout: pip install '.{f'[{extra}]' if extra else ''}'"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say in one line which extra of a checkout installs it ("": a core one)."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{module} is not usable here ({one_line(error)}): {install_hint(extra)}") from error
    except Exception as error:  # a broken installation: a library that is missing, binaries of another version
        reason = one_line(error)[:160] or type(error).__name__
        raise UserError(f"{module} is installed but cannot be imported ({reason}): install it again") from error


def check_replaceable(path: Path) -> None:
    """Raise `UserError` if there is anything but a regular file, whose place none can take: a folder, a device."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise UserError(f"cannot write {path}: it is {kind}; choose another output path")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on failure nothing is left.

    A symbolic link stays one: what it points to is replaced.
    """
    path = Path(path)
    try:
        check_replaceable(path)
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another output path") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; outputs follow the user's umask
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another output path") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Write JSON atomically; NaN and infinity are refused, since other readers do not take them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def expanded(what: str, path: str, kind: str = "path") -> Path:
    """The path of an option or entry, its ``~`` replaced; an empty one, or one of no user, is a `UserError`."""
    if not path:  # an unset variable of a script, say: Path("") would be the current folder
        raise UserError(f"{what} is empty; name a {kind}")
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError
        return Path(path).expanduser()
    except ValueError as error:  # UnicodeEncodeError, too
        raise UserError(f"{what} {path!r} is no path that a file can have; name a {kind}") from error
    except RuntimeError as error:
        raise UserError(f"no such user: the ~ of {path} has no folder") from error


def check_file(path: str | Path, what: str, max_bytes: int = 4 << 30) -> Path:
    """The path of an existing, non-empty, not absurdly large regular file, or a `UserError`."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{what} {path} does not exist")
    if not path.is_file():
        inside = path / "model.pt"
        raise UserError(f"{what} {path} is not a file{f'; give {inside}' if inside.is_file() else ''}")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{what} {path} is empty; make it again")
    if size > max_bytes:
        raise UserError(f"{what} {path} has {size:,} bytes, more than the {max_bytes:,} that are read")
    return path
