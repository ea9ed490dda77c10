"""The suite's last words: a short table of what was measured, what was not, and what is wrong."""

from gpu.record import Record
from gpu.suite import COMPARE, MODEL

MIB = 1 << 20


def text(record: Record) -> str:
    """All parts that have rows, as plain text."""
    head = record.head
    title = f"{head['card']['name']}, commit {_commits(record)}, sources {head['sources']}"
    dry = ["DRY RUN on a CPU: none of these figures is a measurement of a GPU"] if head["dry"] else []
    parts = [_correctness(record), _speed(record), _memory(record), _steps(record), _training(record), _open(record)]
    return "\n\n".join("\n".join(lines) for lines in ([title, *dry], *parts) if lines)


def _commits(record: Record) -> str:
    """Of all sittings whose rows are there: of the same sources, but what is around them may have changed."""
    sittings = [row.get("sitting", record.head) for row in record.rows.values()] or [record.head]
    return ", ".join(dict.fromkeys(str(sitting["commit"]) for sitting in sittings))


def _measured(record: Record, part: str) -> dict[str, dict]:
    return {key: row for key, row in record.of(part).items() if row["status"] == "measured"}


def _correctness(record: Record) -> list[str]:
    rows = record.of("a").values()
    if not rows:
        return []
    counts = {name: sum(row["status"] == name for row in rows) for name in ("passed", "failed", "skipped")}
    return ["correct: " + ", ".join(f"{count} {name}" for name, count in counts.items())]


def _speed(record: Record) -> list[str]:
    rows = _measured(record, "b")
    if not rows:
        return []
    header = ("setting", f"{COMPARE} ms", f"{MODEL} ms", "predicted", "img/s", "faster by (95% interval)", "loading s")
    return _columns([header, *(_timed(key, row) for key, row in rows.items())])


def _timed(key: str, row: dict) -> tuple[str, ...]:
    ours, theirs = row["model"], row["compare"]
    name = key.removeprefix("b/") + (f" ({row['compare_engine']})" if "compare_engine" in row else "")
    loading = [
        side["load_seconds"] + (side.get("compile_seconds") or 0) for side in (ours, theirs) if "load_seconds" in side
    ]
    return (
        name,
        f"{theirs['median_ms']:.3f}",
        f"{ours['median_ms']:.3f}",
        f"{ours['predicted_ms']:.3f}" if "predicted_ms" in ours else "",
        f"{ours['images_per_second']:,.0f}" if "images_per_second" in ours else "",
        f"{row['ratio']:.3f}x ({row['low']:.3f} to {row['high']:.3f}){' *' if row['warnings'] else ''}",
        f"{sum(loading):.0f}" if loading else "",
    )


def _memory(record: Record) -> list[str]:
    table = [("peak feature maps", f"{COMPARE} MiB", f"{MODEL} MiB", "smaller by")]
    for key, row in _measured(record, "c").items():
        for source, peaks in row["peaks"].items():
            theirs, ours = peaks.get(COMPARE), peaks.get(MODEL)
            cells = [f"{peak / MIB:.2f}" if peak is not None else "-" for peak in (theirs, ours)]
            table.append((f"{key.split('/')[1]} {source}", *cells, f"{theirs / ours:.2f}x" if theirs and ours else "-"))
    return _columns(table) if len(table) > 1 else []


def _steps(record: Record) -> list[str]:
    lines = []
    for key, row in _measured(record, "d").items():
        if "limits" in row:
            limits = row["limits"]
            lines.append(
                f"limits: {limits['tflops']:.0f} TFLOP/s, {limits['dram_gb_s']:.0f} GB/s DRAM, "
                f"{limits['l2_gb_s']:.0f} GB/s L2"
            )
            continue
        times = f"whole {row['whole_us']:.0f} us, sum of steps {row['sum_us']:.0f} (tuned {row['tuned_us']:.0f}"
        lines.append(f"{key[2:]}: {times}, predicted {row['predicted_us']:.0f}); the two worst:")
        for step in (step for step in row["steps"] if step["name"] in row["worst"]):
            lines.append(
                f"  {step['name']} ({step['kernel']}): {step['us']:.1f} us (tuned {step['tuned_us']:.1f}, "
                f"predicted {step['predicted_us']:.1f}), "
                f"{step['tflops']:.0f} TFLOP/s, {step['gb_s']:.0f} GB/s, {step['share']:.0%} of {step['limit']}"
            )
    return lines


def _training(record: Record) -> list[str]:
    return [
        f"training {key[2:]} on {row['recipe']['data']}: {row['images_per_second']:,.0f} images/s"
        for key, row in _measured(record, "e").items()
    ]


def _open(record: Record) -> list[str]:
    """Reasons with the rows that share them, failures first."""
    reasons: dict[str, list[str]] = {}
    for status in ("failed", "not measured", "skipped"):
        for key, row in record.rows.items():
            if row["status"] == status:
                reasons.setdefault(f"{status}: {row.get('reason', '')}".removesuffix(": "), []).append(key)
    lines = [f"{reason}: {_some(keys)}" for reason, keys in reasons.items()]
    return lines + [f"* {text}" for text in record.warnings]


def _some(keys: list[str], most: int = 4) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of one width each, the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if not index else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
