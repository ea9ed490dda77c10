"""The terminal's tables and verdicts, from the content of ``bench.json``."""

import re
from collections.abc import Sequence

from rd_deploy.bench.statistics import difference
from rd_deploy.common import escaped

NUMBER = re.compile(r"-|[0-9.,]+%?")
WORDS = {"speed": "{target:g}x faster", "memory": "{target:g}x smaller", "share": "about {target:.0%}"}


def render(document: dict) -> str:
    """The whole report as text."""
    parts = [
        _machine(document["environment"]),
        "Latency, host to host (NumPy images in, NumPy logits out), ms per batch",
        _latency(document),
        f"Speed: time of {document['compare']} / time of {document['model']} (above 1: {document['model']} is faster)",
        _ratios(document),
        "Feature maps (ledgers are counted, engines' figures are their own; never RSS)",
        _memory(document),
        "Claims",
        verdicts(document["claims"]),
    ]
    for entry in document.get("profiles", ()):
        parts += [_profile_heading(entry), _profile(entry)]
    if document["skipped"]:
        parts += ["Skipped", "\n".join(f"  {_place(entry)}: {entry['reason']}" for entry in document["skipped"])]
    if document["warnings"]:
        parts += ["Warnings", "\n".join(f"  {text}" for text in document["warnings"])]
    # Reasons and warnings have what files name their parts.
    return "\n".join(map(escaped, "\n\n".join(_join(parts)).split("\n")))


def verdicts(claims: Sequence[dict]) -> str:
    """One line per claim: its name, what was claimed, and what came out."""
    rows = [(claim["name"], WORDS[claim["name"].split("/")[0]].format(**claim), claim["text"]) for claim in claims]
    return table(("claim", "target", "verdict"), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; numbers are set right. What a terminal cannot print is escaped."""
    rows = [[escaped(cell) for cell in row] for row in rows]
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(NUMBER.fullmatch(cell) for cell in column[1:]) for column in columns]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  " + "  ".join(_cell(cell, *shape) for cell, *shape in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )


def _cell(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


def _join(parts: list[str]) -> list[str]:
    """A heading stays with what follows it: the machine's line first, then pairs."""
    return [parts[0], *(f"{heading}\n{body}" for heading, body in zip(parts[1::2], parts[2::2], strict=True))]


def _machine(machine: dict) -> str:
    cpu = machine["cpu"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    steal = machine.get("steal_share")
    load = machine["load_average"]
    return (
        f"{_gpu(machine.get('gpu'))}{cpu['model'] or 'unknown CPU'} ({cpu['architecture']}), "
        f"{machine['threads']} threads of {len(cpu['affinity'])} CPUs, "
        f"load {'?' if load is None else format(load[0], '.2f')} at the start, "
        f"steal {'?' if steal is None else format(steal, '.1%')}\n{packages}"
    )


def _gpu(gpu: dict | None) -> str:
    """Of a run on a GPU, in front of the CPU: the card, its driver, and what compiles for it."""
    if gpu is None:
        return ""
    words = {"driver": "driver", "cuda": "CUDA", "ptxas": "ptxas"}
    versions = "".join(f", {word} {gpu[key]}" for key, word in words.items() if gpu[key])
    size = f"{gpu['multiprocessors']} multiprocessors, {gpu['memory_bytes'] / 2**30:.0f} GiB"
    return f"{gpu['name']} (sm_{gpu['capability']}, {size}){versions}; "


def _latency(document: dict) -> str:
    header = ("model", "engine", "precision", "batch", "median", "95% interval", "p90", "p99", "cv", "samples")
    return table(
        header,
        [
            (
                row["model"],
                engine_label(row),
                row["precision"],
                str(row["batch"]),
                f"{row['median_ms']:.2f}",
                f"{row['low_ms']:.2f} to {row['high_ms']:.2f}",
                _time(row["p90_ms"]),
                _time(row["p99_ms"]),
                f"{row['cv']:.1%}",
                str(len(row["samples_ms"])),
            )
            for row in document["results"]
        ],
    )


def engine_label(row: dict) -> str:
    """``native (avx512)``: an engine and what it chose to run with."""
    return f"{row['engine']} ({row['variant']})" if row.get("variant") else row["engine"]


def _time(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.2f}"


def _ratios(document: dict) -> str:
    rows = [(engine_label(row), row) for row in document["ratios"]]
    rows += [(f"best: {row['model_engine']} vs {row['compare_engine']}", row) for row in document["best"]]
    rows += [
        (f"{row['model_engine']} vs best other: {row['compare_engine']}", row)
        for row in document.get("native_against_others", ())
    ]
    header = ("engine", "precision", "batch", "ratio", "95% interval", "")
    return table(
        header,
        [
            (
                label,
                row["precision"],
                str(row["batch"]),
                f"{row['ratio']:.3f}",
                f"{row['low']:.3f} to {row['high']:.3f}",
                difference(row["low"], row["high"]),
            )
            for label, row in rows
        ],
    )


def _memory(document: dict) -> str:
    header = ("model", "precision", "batch", "by", "peak KiB", "shortcuts KiB", "share", "traffic KiB", "weights KiB")
    sources = list(dict.fromkeys(row["source"] for row in document["memory"]))
    return table(
        header,
        [
            (
                row["model"],
                row["precision"],
                str(row["batch"]),
                row["source"],
                _kibibytes(row["peak_bytes"]),
                _kibibytes(row["shortcut_peak_bytes"]),
                "-" if row["shortcut_share"] is None else f"{row['shortcut_share']:.1%}",
                _kibibytes(row["traffic_bytes"]),
                _kibibytes(row["weight_bytes"]),
            )
            for row in sorted(
                document["memory"], key=lambda row: (row["precision"], row["batch"], sources.index(row["source"]))
            )
        ],
    )


def _profile_heading(entry: dict) -> str:
    limits = entry["limits"]
    return (
        f"Steps of {entry['model']} on {engine_label(entry)}, {entry['precision']}, batch {entry['batch']}: medians of "
        f"{entry['runs']} runs\n  limits here: {limits['gflops']:.0f} GFLOP/s; reading {limits['cache_gb_s']:.0f} GB/s "
        f"from the cache, {limits['network_gb_s']:.0f} at this network's size, {limits['memory_gb_s']:.0f} from memory"
    )


def _profile(entry: dict) -> str:
    header = ("step", "how", "ms", "GFLOP/s", "weights GB/s", "of limit", "which is")
    rows = [
        (
            step["name"],
            step["kernel"],
            f"{step['median_ms']:.3f}",
            f"{step['gflops']:.1f}",
            f"{step['weights_gb_s']:.1f}",
            f"{step['share']:.0%}",
            step["limit"],
        )
        for step in entry["steps"]
    ]
    total, least = entry["median_ms"], sum(step["limit_ms"] for step in entry["steps"])
    flops, weights = (sum(step[key] for step in entry["steps"]) / total / 1e6 for key in ("flops", "weight_bytes"))
    rows.append(("all", "", f"{total:.3f}", f"{flops:.1f}", f"{weights:.1f}", f"{least / total:.0%}", ""))
    return table(header, rows)


def _kibibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**10:,.1f}"


def _place(entry: dict) -> str:
    where = [entry["engine"], entry["precision"], None if entry["batch"] is None else f"batch {entry['batch']}"]
    return " ".join(part for part in where if part)
