"""Tables of speed and memory on CPUs, and of the compiled engine's agreement with torch."""

import re
from collections.abc import Iterable
from pathlib import Path

from committed import RESULTS, markdown, newest

MACHINE = "epyc-genoa-2c"  # whose speed and memory the tables of the CPU show; `machines` has the others, too
AMX_MACHINE = "xeon-emerald-2c"


STAR = "*: unsteady times, see `warnings` in the file."


def provenance(bench: dict, script: str = "compare_resnet50.sh") -> str:
    """Machine, what disturbed it, versions, date and command of a committed bench.json."""
    environment, options = bench["environment"], bench["options"]
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "onnxruntime", "openvino"))
    settings = f"RD_ISA={_named(bench)} " if _named(bench) else ""
    settings += f"SECONDS_PER_PAIR={options['seconds']:g} "
    if script == "compare_resnet50.sh" and options["precisions"] != ["fp32", "bf16"]:
        settings += f"PRECISION={','.join(options['precisions'])} "
    disturbed = "".join(f" Warning of that run: {text}." for text in _general_warnings(bench))
    return (
        f"{environment['threads']} threads of {environment['cpu']['model']}, {versions}, {environment['date'][:10]}."
        f"{disturbed} From `{bench['path']}`, made by "
        f"`{settings}benchmarks/{script} {Path(bench['path']).parent.name}`."
    )


def _general_warnings(bench: dict) -> list[str]:
    """Those of one pair begin with its label, and a star stands beside its times."""
    return [text for text in bench["warnings"] if not re.match(r"[^:]* batch \d+:", text)]


def _was_busy(bench: dict) -> bool:
    """Whether the machine was when the measurement began."""
    return any(text.startswith("load ") for text in bench["warnings"])


def speed() -> str:
    """Latency of both networks per engine, and the paired ratio with its interval."""
    bench = newest("*-bench-plain50.json", MACHINE)
    times = {(row["model"], row["engine"], row["precision"], row["batch"]): row for row in bench["results"]}
    model, compare = _networks(bench)
    rows = []
    for ratio in bench["ratios"]:
        key = (ratio["engine"], ratio["precision"], ratio["batch"])
        rows.append(
            [
                f"{key[0]} {key[1]}, batch {key[2]}{_star(bench, f'{key[0]} {key[1]} batch {key[2]}')}",
                f"{times[(compare, *key)]['median_ms']:.1f}",
                f"{times[(model, *key)]['median_ms']:.1f}",
                _ratio(ratio),
                str(len(times[(model, *key)]["samples_ms"]) // 2),
            ]
        )
    header = ["engine", f"{compare}, ms per batch", f"{model}, ms per batch", "faster by (95% interval)", "quads"]
    source = (
        "Medians, 224x224, random weights, host to host. A quad times the two networks in the order A B B A; the ratio "
        f"is the median over quads, not the quotient of the columns. {STAR} {provenance(bench)}"
    )
    return f"{markdown(header, rows)}\n\n{source}"


def memory() -> str:
    """Peak feature maps of both networks in fp32, by whose account, at batch 1 and the ratio at every batch."""
    bench = newest("*-bench-plain50.json", MACHINE)
    model, compare = _networks(bench)
    peaks = _peaks(bench)
    first = _batches(bench)[0]
    header, rows = _memory(bench, {source: source for source in peaks})
    shares = [found[compare, first]["shortcut_share"] for found in peaks.values()]
    rows = [[*row, "" if share is None else f"{share:.0%}"] for row, share in zip(rows, shares, strict=True)]
    least = peaks["ledger, in-place"][compare, first]["peak_bytes"]
    ours = ", ".join(
        f"`{source}` {least / found[model, first]['peak_bytes']:.2f}x"
        for source, found in peaks.items()
        if source.startswith("native")
    )
    note = (
        f"Peak feature maps by each account; fp32, 224x224. A row's ratio is between two plans of one engine; against "
        f"the least that {compare} needs layer by layer on any (`ledger, in-place`) it is, at batch {first}: {ours}."
    )
    return f"{markdown([*header, f'held by shortcuts in {compare}'], rows)}\n\n{note} {provenance(bench)}"


# The accounts that the README shows, and what it calls them.
ACCOUNTS = {
    "ledger, separate": "ledger, separate sums",
    "ledger, in-place": "ledger, in-place sums",
    "torch allocator": "torch's allocator",
    "onnxruntime arena": "ONNX Runtime's arena",
    "native arena": "our engine's arena",
    "native small arena": "our engine's arena, small plan",
}


def memory_summary() -> str:
    """The README's table: the accounts of what a run really takes."""
    bench = newest("*-bench-plain50.json", MACHINE)
    note = f"Peak feature maps, fp32, 224x224, {bench['environment']['threads']} threads, without weights."
    return f"{markdown(*_memory(bench, ACCOUNTS))}\n\n{note} [All accounts, and where from](docs/results.md#memory)."


def _memory(bench: dict, accounts: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: peaks at the first batch and the ratio at every one, by the accounts, so called."""
    model, compare = _networks(bench)
    batches, peaks = _batches(bench), _peaks(bench)
    rows = []
    for source, label in accounts.items():
        found = peaks[source]
        pairs = [[found.get((name, batch), {}).get("peak_bytes") for name in (compare, model)] for batch in batches]
        ratios = [f"{theirs / ours:.2f}x" if ours and theirs else "-" for theirs, ours in pairs]
        cells = [f"{peak / 2**20:.2f}" if peak else "none published" for peak in pairs[0]]
        rows.append([label, *cells, *ratios])
    header = ["account", *(f"{name}, MiB, batch {batches[0]}" for name in (compare, model))]
    return [*header, *(f"smaller by, batch {batch}" for batch in batches)], rows


def _networks(bench: dict) -> tuple[str, str]:
    """The names of the network and of the one that it is compared with."""
    model, compare = (network["name"] for network in bench["networks"])
    return model, compare


def _batches(bench: dict) -> list[int]:
    return sorted({row["batch"] for row in bench["memory"]})


def _peaks(bench: dict) -> dict[str, dict[tuple[str, int], dict]]:
    """By account, the fp32 rows of memory by network and batch."""
    peaks: dict[str, dict[tuple[str, int], dict]] = {}
    for row in bench["memory"]:
        if row["precision"] == "fp32":
            peaks.setdefault(row["source"], {})[row["model"], row["batch"]] = row
    return peaks


def machines() -> str:
    """plain-50 on our engine against ResNet-50 on the best of the others, and best against best, on every machine."""
    rows = [
        [
            f"{machine}, {row['precision']} ({_kind(bench, row)}), batch {row['batch']}",
            f"{row['compare_times']['median_ms']:.1f} ({row['compare_engine']})",
            f"{row['model_times']['median_ms']:.1f}",
            _together(bench, row),
            _alone(bench, row),
            _packed(bench, row),
        ]
        for machine, bench in _benches()
        for row in bench["native_against_others"]
    ]
    header = [
        "machine, precision (our instruction set)",
        "resnet50 on the best other engine, ms",
        "plain50 on ours, ms",
        "network and engine: faster by (95% interval)",
        "network alone: best engine against best",
        "transformed weights, MB",
    ]
    note = (
        f"{_BOLD} Network alone: ours is the best engine for both, unless others are named. Ratios are medians over "
        f"interleaved quads, not quotients of the columns. {STAR} Each pair is measured by itself, so that two columns "
        "may differ by more than the intervals, which are of one pair. Transformed weights: of plain50, for Winograd's "
        "convolution or for amx_bf16x2, beside those of the file. amx_bf16x2 computes with two bf16 for each number, "
        "which is coarser than fp32; its rivals' times are of fp32."
    )
    return "\n\n".join([markdown(header, rows), note, _listed(bench for _, bench in _benches())])


_BOLD = "**Bold**: 1.4x holds, the whole interval is at or above it; *undecided*: 1.4x lies inside the interval."


def speed_summary() -> str:
    """The README's table: a line per machine and precision, the times of the smallest batch."""
    lines: dict[tuple[str, str], list[tuple[dict, dict]]] = {}
    for machine, bench in _benches():
        for row in bench["native_against_others"]:
            lines.setdefault((machine, f"{row['precision']} ({_kind(bench, row)})"), []).append((bench, row))
    batches = sorted({row["batch"] for found in lines.values() for _, row in found})
    rows = []
    for (machine, precision), unsorted in lines.items():
        found = {row["batch"]: (bench, row) for bench, row in unsorted}
        first_bench, first = found[batches[0]]
        times = [first[f"{which}_times"]["median_ms"] for which in ("compare", "model")]
        rows.append(
            [
                f"{machine}, {precision}{' †' if _was_busy(first_bench) else ''}",
                " → ".join(f"{time:.1f}" for time in times),
                *(of(*found[batch]) for of in (_together, _alone) for batch in batches),
            ]
        )
    header = [
        "CPU, precision",
        f"ms at batch {batches[0]}",
        *(f"{what}, batch {batch}" for what in ("network and engine", "network alone") for batch in batches),
    ]
    threads = sorted({bench["environment"]["threads"] for _, bench in _benches()})
    note = (
        f"{_BOLD} ms: ResNet-50 on the best other engine → plain-50 on ours. 224x224, random weights, "
        f"{' or '.join(map(str, threads))} threads, from NumPy to NumPy; ratios are medians of interleaved quads. *: "
        "unsteady times. †: the load was over 0.5 per CPU when it began. [Details, versions and "
        "commands](docs/results.md#every-machine)."
    )
    return f"{markdown(header, rows)}\n\n{note}"


def _kind(bench: dict, row: dict) -> str:
    """The instruction set of our engine."""
    return _same(bench, row)["variant"]


def _together(bench: dict, row: dict) -> str:
    """plain-50 on ours against ResNet-50 on the best other engine."""
    return _judged(bench, row, row, "native-against-others")


def _alone(bench: dict, row: dict) -> str:
    """The best engine for each network against each other, which are named unless both are ours."""
    best = next(found for found in bench["best"] if _setting(found) == _setting(row))
    engines = [best["model_engine"], best["compare_engine"]]
    # Of one engine for both the ratio is that engine's own, and so are its warnings.
    said = _judged(bench, row, best, "best", engines[0] if engines[0] == engines[1] else "best")
    return said if engines == ["native", "native"] else f"{said}, {' against '.join(engines)}"


def _judged(bench: dict, row: dict, ratio: dict, claim: str, label: str | None = None) -> str:
    """A ratio, bold where the claim of speed holds; ``label``: what warnings call it, by default as the claim."""
    precision, batch = _setting(row)
    name = f"speed/{claim}/{precision}/batch-{batch}"
    holds = next(found["holds"] for found in bench["claims"] if found["name"] == name)
    said = f"**{_ratio(ratio)}**" if holds else _ratio(ratio) + (" *undecided*" if holds is None else "")
    return said + _star(bench, f"{label or claim} {precision} batch {batch}")


def _listed(benches: Iterable[dict], script: str = "compare_resnet50.sh") -> str:
    """Where figures are from, a line per file."""
    return "\n".join(f"- {provenance(bench, script)}" for bench in benches)


def _benches() -> list[tuple[str, dict]]:
    """Every machine with its newest comparison, and with those where RD_ISA named our instruction set."""
    names = sorted({path.parent.name for path in RESULTS.glob("*/*-bench-plain50.json")})
    found = []
    for machine in names:
        named = {path.name.partition("-bench-")[2] for path in (RESULTS / machine).glob("*-bench-plain50-*.json")}
        found += [(machine, newest(f"*-bench-{name}", machine)) for name in ["plain50.json", *sorted(named)]]
    return found


def _named(bench: dict) -> str:
    """The instruction set that RD_ISA named for our engine; empty where it took the best one."""
    return bench["environment"]["variables"].get("RD_ISA", "")


def _same(bench: dict, row: dict) -> dict:
    """The ratio of the two networks on our engine, in the setting of another row."""
    return next(found for found in bench["ratios"] if (found["engine"], *_setting(found)) == ("native", *_setting(row)))


def _setting(row: dict) -> tuple[str, int]:
    return row["precision"], row["batch"]


def _star(bench: dict, label: str) -> str:
    return " *" if any(text.startswith(f"{label}:") for text in bench["warnings"]) else ""


def _packed(bench: dict, row: dict) -> str:
    model = bench["networks"][0]["name"]
    entry = next(found for found in bench["profiles"] if found["model"] == model and _setting(found) == _setting(row))
    return f"{entry['memory']['packed_bytes'] / 1e6:.0f}"


def _ratio(row: dict) -> str:
    return f"{row['ratio']:.2f}x ({row['low']:.2f} to {row['high']:.2f})"


def native_basic() -> str:
    """The networks of basic blocks, whose maps are all narrow: plain-18 and plain-34 against their ResNets."""
    found = sorted({path.parent.name for path in RESULTS.glob("*/*-bench-plain18.json")})
    benches = [newest(f"*-bench-plain{depth}.json", machine) for machine in found for depth in (18, 34)]
    rows = []
    for bench in benches:
        (row,) = bench["native_against_others"]
        setting = f"{row['precision']} batch {row['batch']}"
        rows.append(
            [
                f"{Path(bench['path']).parent.name}, {' and '.join(_networks(bench))}",
                f"{row['compare_times']['median_ms']:.1f} ({row['compare_engine']})",
                f"{row['model_times']['median_ms']:.1f}",
                _together(bench, row),
                _ratio(_same(bench, row)) + _star(bench, f"native {setting}"),
            ]
        )
    header = [
        "bf16, batch 1",
        "ResNet on OpenVINO, ms",
        "plain on ours, ms",
        "network and engine: faster by (95% interval)",
        "both on ours",
    ]
    return f"{markdown(header, rows)}\n\n{_BOLD} {STAR}\n\n{_listed(benches, 'compare_basic.sh')}"


def native_memory() -> str:
    """Arena of plain-50 in bf16 at batch 1, by the number of threads, against ResNet-50's optimal plan."""
    document = newest("*-engine-memory.json", MACHINE)
    best = document["resnet50_optimal_bytes"]
    rows = [
        [
            str(row["threads"]),
            *(
                f"{row[plan]['arena_bytes']:,} ({best / row[plan]['arena_bytes']:.2f}x)"
                for plan in ("default", "small")
            ),
            *(f"{row[plan]['feature_map_bytes']:,}" for plan in ("default", "small")),
        ]
        for row in document["plans"]
    ]
    header = ["threads", "arena, bytes", "arena, `RD_FLAG_SMALL`", "of which maps", "of which maps, `RD_FLAG_SMALL`"]
    source = (
        "plain-50, 224x224, batch 1, bf16; in brackets how many times smaller than ResNet-50's optimal plan, "
        f"{best:,} bytes of maps alone. Scratch is per thread, so that with many threads little or nothing is gained. "
        f"Plans, not measurements: {document['isa']}. From `{document['path']}`, made by `benchmarks/engine_memory.py`."
    )
    return f"{markdown(header, rows)}\n\n{source}"


def ablation() -> str:
    """What fusion, Winograd's convolution and the small plan are each worth in time."""
    document = newest("*-engine-ablation.json", MACHINE)
    names = list(dict.fromkeys(row["plan"] for row in document["results"]))
    settings = list(dict.fromkeys((row["model"], row["precision"], row["batch"]) for row in document["results"]))
    found = {(row["model"], row["precision"], row["batch"], row["plan"]): row for row in document["results"]}
    rows = []
    for setting in settings:
        model, precision, batch = setting
        cells = [_ratio(row) + " *" * bool(row.get("warnings")) for row in (found[*setting, name] for name in names)]
        rows.append([f"{model}, {precision}, batch {batch}", *cells])
    environment = document["environment"]
    # Older files say no warnings, and their load is that of the end.
    doubted = all("warnings" in row for row in document["results"])
    source = (
        "Time of each plan / time of the default plan, interleaved: above 1, the default is faster. "
        f"{STAR + ' ' if doubted else 'Whether times were steady was not kept. '}"
        f"{environment['threads']} threads of {environment['cpu']['model']}, {environment['date'][:10]}; load "
        f"{environment['load_average'][0]:.2f} when it {'began' if doubted else 'ended'}. From `{document['path']}`, "
        "made by `benchmarks/engine_ablation.py`."
    )
    return f"{markdown(['', *names], rows)}\n\n{source}"


def _is_bf16_single(row: dict) -> bool:
    return (row["precision"], row["batch"]) == ("bf16", 1)


def profile(machine: str = MACHINE) -> str:
    """Every step of plain-50 on our engine in bf16 at batch 1, against a machine's limits."""
    bench = newest("*-bench-plain50.json", machine)
    model = bench["networks"][0]["name"]
    entry = next(row for row in bench["profiles"] if row["model"] == model and _is_bf16_single(row))
    rows = [
        [
            f"{step['name']} ({step['kernel']})",
            f"{step['median_ms']:.3f}",
            f"{step['gflops']:.0f}",
            f"{2 * step['macs'] / step['median_ms'] / 1e6:.0f}",
            f"{step['share']:.0%} of {step['limit']}",
        ]
        for step in entry["steps"]
    ]
    header = ["step", "ms", "GFLOP/s done", "as a direct convolution", "share of the limit here"]
    limits = entry["limits"]
    source = (
        f"Medians of {entry['runs']} runs. Limits, measured in the same run: {limits['gflops']:.0f} GFLOP/s of our own "
        f"matrix products in the first cache, {limits['network_gb_s']:.0f} GB/s reading as many bytes as a run touches."
        " "
        "The limit of a step is the longer of its arithmetic and of reading its weights and maps."
    )
    return f"{markdown(header, rows)}\n\n{source} {provenance(bench)}"


def amx_profile() -> str:
    """The same on a CPU with tiles."""
    return profile(AMX_MACHINE)


def amx_tiles() -> str:
    """Cycles of a tile product by the number of tiles in use."""
    document = newest("*-amx-tiles.json")
    rows = [
        [
            row["pattern"],
            *(f"{cycles:.0f}" if cycles else "no sample" for cycles in (row["fast_cycles"], row["slow_cycles"])),
        ]
        for row in document["results"]
    ]
    counts = {state: min(row[f"{state}_samples"] for row in document["results"]) for state in ("fast", "slow")}
    header = ["groups of 16 pixels x blocks of 16 outputs", "fast state, cycles per product", "slow state"]
    environment = document["environment"]
    source = (
        "Medians, in cycles of the clock that scalar instructions reach, which tiles may not; operands in the "
        f"first-level cache, no other instructions. {counts['fast']:,} samples or more in the fast state, "
        f"{counts['slow']:,} in the slow one, told apart by the first pattern before and after each. "
        f"{environment['cpu']['model']}, {document['hertz'] / 1e9:.1f} GHz, {environment['date'][:10]}; load "
        f"{environment['load_average'][0]:.2f} when it ended. From `{document['path']}`, made by "
        "`benchmarks/amx_tiles.py`."
    )
    return f"{markdown(header, rows)}\n\n{source}"


def amx_agreement() -> str:
    """The same on a CPU with tiles."""
    return agreement(AMX_MACHINE)


def agreement(machine: str = MACHINE) -> str:
    """Top-1 agreement of the compiled engine with torch on trained networks."""
    document = newest("*-native-agreement.json", machine)
    rows = [
        [
            f"{_trained(row)}, {row['plan']} ({row['isa']})",
            f"{row['images']:,}",
            f"{row['top1_agreement']:.2%}",
            f"{row['accuracy_torch']:.2%}",
            f"{row['accuracy_native']:.2%}",
            f"{row['max_error']:.1e}",
        ]
        for row in document["results"]
    ]
    header = ["network and plan", "test images", "same class", "accuracy, torch fp32", "accuracy, native", "max error"]
    source = (
        "The error is that of a logit, in standard deviations of the logits. The networks are of short trainings, "
        "whose settings are in the file. "
        f"{document['environment']['cpu']['model']}, {document['date']}. From `{document['path']}`, made by "
        "`benchmarks/native_agreement.py`."
    )
    return f"{markdown(header, rows)}\n\n{source}"


def _trained(row: dict) -> str:
    """A trained network's name, data and what of its recipe made its accuracy."""
    recipe = row["recipe"]
    parts = [row["model"]]
    if recipe["width"] != 1:
        parts.append(f"{recipe['width']:g} of the width")
    if recipe["train_limit"]:
        parts.append(f"{recipe['train_limit']:,} images")
    return ", ".join([*parts, f"{recipe['epochs']} epochs"])


def loader() -> str:
    """Training images a second by our loader and by torchvision's transforms."""
    document = newest("*-loader.json")
    rows = [
        [
            f"torchvision v2, decoded by {row['decoder']}",
            f"{row['their_images_per_second']:.0f}",
            f"{row['images_per_second']:.0f}",
            _ratio(row) + (" *" if row["warnings"] else ""),
        ]
        for row in document["results"]
    ]
    environment = document["environment"]
    header = ["against", "images/s", "ours, images/s", "faster by (95% interval)"]
    packages, size = environment["packages"], f"{document['width']}x{document['height']}"
    source = (
        f"JPEGs of {size} pixels, {document['mean_bytes'] / 1e3:.0f} kB, to batches of {document['batch']} at 224x224, "
        f"random-resized crops, mirrored and normalised; epochs of {document['images']} images, interleaved, "
        f"{min(row['quads'] for row in document['results'])} quads or more. {STAR} {document['workers']} workers on "
        f"{len(environment['cpu']['affinity'])} CPUs of {environment['cpu']['model']}, torchvision "
        f"{packages['torchvision']}, Pillow {document['pillow']}, {environment['date'][:10]}; load "
        f"{environment['load_average'][0]:.2f} when it began. From `{document['path']}`, made by "
        "`benchmarks/loader.py`."
    )
    return f"{markdown(header, rows)}\n\n{source}"
