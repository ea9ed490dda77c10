"""Builds the compiled engine: the one place that knows its sources and flags. Needs the standard library only.

    python rd_deploy/native/build.py                                   # the library, beside this file
    python rd_deploy/native/build.py --output DIR --compiler clang++ --werror
    python rd_deploy/native/build.py --output DIR --sanitize address,undefined --executable NAME SOURCE [SOURCE...]

Objects stay in ``build/native`` of the checkout; one is made again when its source, its headers or its command changed.
CXX, CXXFLAGS and LDFLAGS of the environment count, as everywhere. More in docs/development.md.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

NATIVE = Path(__file__).resolve().parent
SOURCES = NATIVE / "src"
KERNELS = SOURCES / "kernels"
OBJECTS = NATIVE.parents[1] / "build" / "native"
MACOS = sys.platform == "darwin"
LIBRARY = "librd.dylib" if MACOS else "librd.so"
INSTALL = "xcode-select --install" if MACOS else "apt-get install g++"
OLDEST = {"g++": 11, "clang++": 14}

HEADERS = (NATIVE / "include", SOURCES)
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
EMPTY = "int main() { return 0; }\n"
EMPTY_FUZZER = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char *, unsigned long) { return 0; }\n'

# A multiplication and an addition are fused where the code says so, and nowhere else: results must not depend on the
# compiler's choices.
DIALECT = ("-std=c++17", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread")
COMMON = (*DIALECT, *(f"-I{folder}" for folder in HEADERS))
RELEASE = ("-O3", "-DNDEBUG")
# Any finding ends the program, so that its test fails; the standard library checks its indices.
# At -O1 clang does not unroll every loop that asks for it, and says so.
SANITIZED = (
    "-O1",
    "-Wno-pass-failed",
    "-g1",  # the lines of a stack trace; variables would take a third more time
    "-fno-omit-frame-pointer",
    "-fno-sanitize-recover=all",
    "-D_GLIBCXX_ASSERTIONS",
)
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow")
# Sizes are unsigned and dimensions are int, and their products are meant: g++ leaves that out of -Wconversion as well.
CORE = (*WARNINGS, "-Wconversion", "-Wno-sign-conversion")
# Vectors pass between functions of one file only, so that compilers may disagree about how they are passed.
KERNEL = (*WARNINGS, "-Wno-psabi")

AVX2 = ("-mavx2", "-mfma")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2, "-mprefer-vector-width=512")
AVX512_BF16 = (*AVX512, "-mavx512bf16")
AMX_BF16 = (*AVX512_BF16, "-mamx-tile", "-mamx-bf16")
# One file of src/kernels each, and the flags it needs besides. Those with flags are for x86-64, and left out where the
# compiler lacks the flags; RD_HAVE_AVX2 and the like tell the other files what there is.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx_bf16": AMX_BF16,
    "amx_bf16x2": AMX_BF16,
}
# Nothing but the C interface leaves the library: the inline functions and the C++ runtime in it must not meet others.
EXPORTS = "{ global: rd_*; local: *; };\n"
# A C++ runtime of our own: the one that a process has loaded (conda's, say) may be older than the compiler's, and then
# the library would not load. Nothing is thrown or handed over across the interface, so two runtimes do no harm.
OWN_RUNTIME = ("-static-libstdc++", "-static-libgcc")
CLEAN = " without warnings"  # in an object's stamp


class BuildError(Exception):
    """The build cannot go on: one line that says what to do. What the compiler said is on stderr already."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that is new enough. ``command``: its words. ``macros``: what it predefines, its version too."""

    command: tuple[str, ...]
    macros: dict[str, str]

    @classmethod
    def find(cls, name: str | None = None) -> "Compiler":
        """``name``, else CXX of the environment, else g++, clang++ or c++; a `BuildError` when there is none."""
        wanted = name or os.environ.get("CXX", "").strip()
        for words in [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]:
            if shutil.which(words[0]):
                return cls(tuple(words), _macros(words))._checked()
        missing = f"the C++ compiler {wanted} was not found" if wanted else "no C++ compiler was found"
        raise BuildError(f"{missing}: {INSTALL} (or set CXX to a compiler)")

    def _checked(self) -> "Compiler":
        clang = "__clang__" in self.macros
        kind, macro = ("clang++", "__clang_major__") if clang else ("g++", "__GNUC__")
        version = int(self.macros.get(macro, 0))
        if version < OLDEST[kind]:
            oldest = " or ".join(f"{name} {least}" for name, least in OLDEST.items())
            raise BuildError(f"{self} is version {version} and {oldest} is needed: set CXX to a newer compiler")
        return self

    def __str__(self) -> str:
        return " ".join(self.command)

    @cached_property
    def isas(self) -> dict[str, tuple[str, ...]]:
        """The instruction sets that it compiles for, with their flags."""
        x86_64 = "__x86_64__" in self.macros
        return {
            isa: flags
            for isa, flags in INSTRUCTION_SETS.items()
            if not flags or (x86_64 and self.accepts([*flags, "-fsyntax-only"]))
        }

    def accepts(self, flags: Sequence[str]) -> bool:
        """Whether it makes something of an empty program with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            return self._probe(folder, flags)

    def runs(self, flags: Sequence[str], source: str = EMPTY) -> bool:
        """Whether an empty program that it makes with these flags runs here (a fuzzer: once)."""
        with tempfile.TemporaryDirectory() as folder:
            made = self._probe(folder, [*flags, "-o", "probe"], source)
            return made and subprocess.run([Path(folder) / "probe", "-runs=1"], capture_output=True).returncode == 0

    def _probe(self, folder: str, flags: Sequence[str], source: str = EMPTY) -> bool:
        Path(folder, "probe.cpp").write_text(source, encoding="utf-8")
        command = [*self.command, "-Werror", "probe.cpp", *flags]
        return subprocess.run(command, capture_output=True, cwd=folder).returncode == 0


def _macros(words: Sequence[str]) -> dict[str, str]:
    command = [*words, "-dM", "-E", "-x", "c++", os.devnull]
    ran = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if ran.returncode != 0:
        raise BuildError(f"{' '.join(words)} does not work as a C++ compiler: {ran.stderr.strip()[:200]}")
    lines = (line.split(maxsplit=2) for line in ran.stdout.splitlines())
    return {line[1]: line[2] if len(line) > 2 else "" for line in lines if len(line) > 1}


@dataclass(frozen=True)
class Build:
    """One configuration of the build.

    ``sanitize``: for ``-fsanitize=``; it turns optimisation down and assertions on. ``werror``: warnings are errors.
    ``flags``: further flags of the compiler and of the linker. ``jobs``: compilers that run at once.
    """

    compiler: Compiler
    sanitize: str = ""
    werror: bool = False
    flags: tuple[str, ...] = ()
    jobs: int = field(default_factory=lambda: _cpus())
    objects: Path = OBJECTS

    def library(self, folder: Path) -> Path:
        """Build the shared library in ``folder``; returns its path."""
        target = folder.absolute() / LIBRARY
        self._link(target, self._compile(self._sources()), ["-shared", *self._library_flags()])
        return target

    def executable(self, target: Path, sources: Sequence[Path]) -> Path:
        """Build a program of the library's sources and ``sources``; returns its path."""
        self._link(target.absolute(), self._compile([*self._sources(), *sources]), [])
        return target

    def _sources(self) -> list[Path]:
        """The library's files for this compiler."""
        if not SOURCES.is_dir():  # an installed package has the library only
            raise BuildError(f"{SOURCES} does not exist: build from a checkout")
        return [*sorted(SOURCES.glob("*.cpp")), *self._kernels()]

    def _kernels(self) -> list[Path]:
        files = sorted(KERNELS.glob("*.cpp"))
        unknown = [path.name for path in files if path.stem not in INSTRUCTION_SETS]
        if unknown:
            raise BuildError(f"src/kernels/{unknown[0]} has no entry in INSTRUCTION_SETS of {Path(__file__).name}")
        return [path for path in files if path.stem in self.compiler.isas]

    def _command(self, source: Path) -> list[str]:
        """The compiler's command for one file, but for its output."""
        is_kernel = source.parent == KERNELS
        return [
            *(*self.compiler.command, *COMMON),
            *(SANITIZED if self.sanitize else RELEASE),
            *((KERNEL + self.compiler.isas[source.stem]) if is_kernel else (CORE + self._defines())),
            *(*_environment("CXXFLAGS"), *self._shared_flags()),
            *("-c", str(source)),
        ]

    def _defines(self) -> tuple[str, ...]:
        return tuple(f"-DRD_HAVE_{path.stem.upper()}" for path in self._kernels() if path.stem != "portable")

    def _shared_flags(self) -> list[str]:
        """What both the compiler and the linker get."""
        return [*([f"-fsanitize={self.sanitize}"] if self.sanitize else []), *self.flags]

    def _library_flags(self) -> list[str]:
        if MACOS:
            return ["-Wl,-exported_symbol,_rd_*", f"-Wl,-install_name,@rpath/{LIBRARY}"]
        exports = self.objects / "exports.map"
        with _replacing(exports) as part:
            part.write_text(EXPORTS, encoding="utf-8")
        flags = [f"-Wl,--version-script={exports}", f"-Wl,-soname,{LIBRARY}"]
        if self.sanitize:  # its runtime comes with the process
            return flags
        own = self.compiler.accepts([*OWN_RUNTIME, "-shared", "-fPIC", "-o", "probe.so"])
        return [*flags, "-Wl,-z,defs", *(OWN_RUNTIME if own else ())]

    def _compile(self, sources: Sequence[Path]) -> list[Path]:
        """The objects of all sources, made where they are not up to date."""
        targets = [_Target.of_source(path.absolute(), self) for path in sources]
        stale = [target for target in targets if not target.is_fresh(self.werror)]
        if stale:
            print(f"native engine: {self.compiler} compiles {len(stale)} of {len(targets)} files", flush=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            made = list(pool.map(lambda target: target.make(self.werror), stale))
        failed = [Path(target.command[-1]).name for target, success in zip(stale, made, strict=True) if not success]
        if failed:
            raise BuildError(f"{self.compiler} cannot compile {', '.join(failed)}: its reasons stand above")
        return [target.path for target in targets]

    def _link(self, path: Path, objects: Sequence[Path], flags: Sequence[str]) -> None:
        command = [*self.compiler.command, "-pthread", *self._shared_flags(), *flags, *map(str, objects)]
        target = _Target.of_objects(path, [*command, *_environment("LDFLAGS")], objects, self)
        if not target.is_fresh() and not target.make():
            raise BuildError(f"{self.compiler} cannot link {path.name}: its reasons stand above")


@dataclass(frozen=True)
class _Target:
    """What a command makes (``-o`` is added); up to date while ``stamp`` holds the digest of all that it depends on."""

    path: Path
    command: list[str]
    digest: str
    stamp: Path

    @classmethod
    def of_source(cls, source: Path, build: Build) -> "_Target":
        command = build._command(source)
        path = build.objects / f"{source.stem}-{_digest(command)[:16]}.o"
        digest = _digest([command, build.compiler.macros, *map(_content, _with_included(source))])
        return cls(path, command, digest, path.with_suffix(".digest"))

    @classmethod
    def of_objects(cls, path: Path, command: list[str], objects: Sequence[Path], build: Build) -> "_Target":
        digest = _digest([command, *map(_content, objects)])
        return cls(path, command, digest, build.objects / f"{path.name}-{_digest(str(path))[:16]}.digest")

    def is_fresh(self, clean: bool = False) -> bool:
        """``clean``: and made without a warning, so that a check for warnings need not make it again."""
        known = self.stamp.read_text(encoding="utf-8") if self.path.exists() and self.stamp.exists() else ""
        return known in ((self.digest + CLEAN,) if clean else (self.digest, self.digest + CLEAN))

    def make(self, werror: bool = False) -> bool:
        """Run the command and replace the file; programs that have the old one loaded keep it."""
        self.stamp.unlink(missing_ok=True)
        with _replacing(self.path) as part:
            command = [*self.command, *(["-Werror"] if werror else []), "-o", str(part)]
            ran = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if ran.stderr:
                print(ran.stderr, file=sys.stderr, end="", flush=True)
            if ran.returncode != 0:
                return False
        with _replacing(self.stamp) as part:
            part.write_text(self.digest + (CLEAN if werror or not ran.stderr else ""), encoding="utf-8")
        return True


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place once it was written; builds may run at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        if part.exists():
            part.replace(path)


def _with_included(source: Path) -> list[Path]:
    """A file, what it includes in quotes, and what that includes: all that its object depends on of ours."""
    files = [source]
    for file in files:
        for name in INCLUDE.findall(file.read_text(encoding="utf-8")):
            found = [folder / name for folder in (file.parent, *HEADERS) if (folder / name).exists()]
            files += [path for path in found[:1] if path not in files]
    return files


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _environment(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Build the compiled engine.")
    parser.add_argument("--output", type=Path, default=NATIVE, metavar="DIR", help="(default: beside this script)")
    parser.add_argument("--executable", metavar="NAME", help="build a program of this name instead of the library")
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE", help="of the program, besides the library's")
    parser.add_argument("--compiler", metavar="CXX", help="(default: CXX of the environment, g++, clang++ or c++)")
    parser.add_argument("--sanitize", default="", metavar="NAMES", help="address,undefined or thread, say")
    parser.add_argument("--werror", action="store_true", help="warnings are errors")
    parser.add_argument(
        "--flag", action="append", default=[], help="a further flag of compiler and linker, as --flag=-pg; repeatable"
    )
    parser.add_argument("--jobs", type=int, default=_cpus(), help="compilers at once (default: %(default)s)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The command; 2 when the build fails."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if bool(options.executable) != bool(options.sources) or options.jobs < 1:
        parser.error("--executable NAME goes with its SOURCEs, and --jobs is at least 1")
    try:
        compiler = Compiler.find(options.compiler)
        build = Build(compiler, options.sanitize, options.werror, tuple(options.flag), options.jobs)
        if options.executable:
            build.executable(options.output / options.executable, options.sources)
        else:
            build.library(options.output)
    except (BuildError, OSError) as error:
        print(f"native engine: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
