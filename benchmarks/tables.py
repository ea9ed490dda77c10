"""The tables of README.md and the pages under docs/, made from the committed results: none is typed by hand.

python benchmarks/tables.py            rewrite the tables between the markers
python benchmarks/tables.py --check    exit 1 where a page differs (a test runs this)
"""

import re
import sys
from collections import Counter
from pathlib import Path

from accuracy_tables import EXPERIMENTS, experiment, short
from committed import RESULTS, ROOT, find, markdown, newest

MACHINE = "epyc-genoa-2c"  # whose speed and memory the tables of the CPU show; `machines` has the others, too


STAR = "*: unsteady times, see `warnings` in the file."


def provenance(bench: dict, script: str = "compare_resnet50.sh") -> str:
    """Machine, what disturbed it, versions, date and command of a committed bench.json."""
    environment, options = bench["environment"], bench["options"]
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "onnxruntime", "openvino"))
    settings = f"SECONDS_PER_PAIR={options['seconds']:g} "
    if script == "compare_resnet50.sh" and options["precisions"] != ["fp32", "bf16"]:
        settings += f"PRECISION={','.join(options['precisions'])} "
    # Those of one pair begin with its label, and a star stands beside its times.
    general = [text for text in bench["warnings"] if not re.match(r"[^:]* batch \d+:", text)]
    disturbed = "".join(f" Warning of that run: {text}." for text in general)
    return (
        f"{environment['threads']} threads of {environment['cpu']['model']}, {versions}, {environment['date'][:10]}."
        f"{disturbed} From `{bench['path']}`, made by "
        f"`{settings}benchmarks/{script} {Path(bench['path']).parent.name}`."
    )


def speed() -> str:
    """Latency of both networks per engine, and the paired ratio with its interval."""
    bench = newest("*-bench-plain50.json", MACHINE)
    times = {(row["model"], row["engine"], row["precision"], row["batch"]): row for row in bench["results"]}
    model, compare = (network["name"] for network in bench["networks"])
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
    model, compare = (network["name"] for network in bench["networks"])
    batches = sorted({row["batch"] for row in bench["memory"]})
    peaks: dict[str, dict[tuple, dict]] = {}
    for row in bench["memory"]:
        if row["precision"] == "fp32":
            peaks.setdefault(row["source"], {})[row["model"], row["batch"]] = row
    rows = []
    for source, found in peaks.items():
        pairs = [[found.get((name, batch), {}).get("peak_bytes") for name in (compare, model)] for batch in batches]
        ratios = [f"{theirs / ours:.2f}x" if ours and theirs else "-" for theirs, ours in pairs]
        cells = [f"{peak / 2**20:.2f}" if peak else "none published" for peak in pairs[0]]
        share = found[compare, batches[0]]["shortcut_share"]
        rows.append([source, *cells, *ratios, "" if share is None else f"{share:.0%}"])
    header = [
        "peak feature maps by",
        *(f"{name}, MiB, batch {batches[0]}" for name in (compare, model)),
        *(f"smaller by, batch {batch}" for batch in batches),
        f"held by shortcuts in {compare}",
    ]
    least = peaks["ledger, in-place"][compare, batches[0]]["peak_bytes"]
    ours = ", ".join(
        f"`{source}` {least / found[model, batches[0]]['peak_bytes']:.2f}x"
        for source, found in peaks.items()
        if source.startswith("native")
    )
    note = (
        f"fp32, 224x224. A row's ratio is between two plans of one engine; against the least that {compare} needs "
        f"layer by layer on any (`ledger, in-place`) it is, at batch {batches[0]}: {ours}."
    )
    return f"{markdown(header, rows)}\n\n{note} {provenance(bench)}"


def native() -> str:
    """plain-50 on our engine against ResNet-50 on the best of the others, and both networks on our engine."""
    bench = newest("*-bench-plain50.json", MACHINE)
    model, compare = (network["name"] for network in bench["networks"])
    same = {(row["precision"], row["batch"]): row for row in bench["ratios"] if row["engine"] == "native"}
    rows = [
        [f"{row['precision']}, batch {row['batch']}", *_against_others(bench, row), _packed(bench, row)]
        for row in bench["native_against_others"]
    ]
    header = [
        "",
        f"{compare} on the best other engine, ms",
        f"{model} on ours, ms",
        "faster by (95% interval)",
        "faster when both are on ours",
        "weights transformed besides, MB",
    ]
    kinds = sorted({f"{row['precision']}: {row['variant']}" for row in same.values()})
    note = (
        f"Ratios are medians over interleaved quads, not quotients of the columns. {STAR} Each pair is measured by "
        "itself: one network's times differ between pairs, and the intervals are those within a pair. "
        f"Transformed weights: of {model}, for Winograd's convolution, beside those of the file."
    )
    source = f"{note} Instruction sets: {', '.join(kinds)}. {provenance(bench)}"
    return "\n\n".join([markdown(header, rows), _judged(bench), source])


def _judged(bench: dict) -> str:
    """What became of the claim of speed: network and engine together, and best engine against best engine."""
    model, compare = (network["name"] for network in bench["networks"])
    said = []
    for who, what in (
        ("native-against-others", f"{model} on ours against {compare} on the best other engine"),
        ("best", "best engine against best engine"),
    ):
        groups: dict[bool | None, list[dict]] = {True: [], None: [], False: []}
        for claim in bench["claims"]:
            if claim["name"].startswith(f"speed/{who}/") and claim["value"] is not None:
                groups[claim["holds"]].append(claim)
        words = {True: "holds", None: "is not decided", False: "does not hold"}
        parts = [
            f"{words[holds]} in {', '.join(_where(claim) for claim in claims)}"
            for holds, claims in groups.items()
            if claims
        ]
        said.append(f"{what}, it {', '.join(parts)}")
    (target,) = {claim["target"] for claim in bench["claims"] if claim["name"].startswith("speed/")}
    return f"**The claim of {target:g}x**: {'; '.join(said)}."


def _where(claim: dict) -> str:
    """``speed/best/fp32/batch-8`` in words, with its value."""
    precision, batch = claim["name"].split("/")[2:]
    return f"{precision} at {batch.replace('-', ' ')} ({claim['value']:.2f}x)"


def machines() -> str:
    """Our engine in fp32 on each machine that has been measured."""
    rows, sources = [], []
    for machine in sorted({path.parent.name for path in RESULTS.glob("*/*-bench-plain50.json")}):
        bench = newest("*-bench-plain50.json", machine)
        kinds = {row["variant"] for row in bench["ratios"] if (row["engine"], row["precision"]) == ("native", "fp32")}
        rows += [
            [
                f"{machine} ({', '.join(sorted(kinds))}), batch {row['batch']}",
                *_against_others(bench, row),
                _best(bench, row),
            ]
            for row in bench["native_against_others"]
            if row["precision"] == "fp32"
        ]
        sources.append(provenance(bench))
    header = ["fp32", "resnet50 on the best other engine, ms", "plain50 on ours, ms"]
    header += ["faster by (95% interval)", "faster when both are on ours", "best engine against best"]
    note = (
        f"Ratios are medians over interleaved quads, not quotients. {STAR} Each pair is measured by itself, also where "
        "two columns are of the same engines: they may differ by more than the intervals, which are of one pair."
    )
    return f"{markdown(header, rows)}\n\n{note} {' '.join(sources)}"


def _against_others(bench: dict, row: dict) -> list[str]:
    """Times and ratio of our engine against the best other one, and the ratio with both networks on ours."""
    setting = f"{row['precision']} batch {row['batch']}"
    same = next(found for found in bench["ratios"] if (found["engine"], *_setting(found)) == ("native", *_setting(row)))
    return [
        f"{row['compare_times']['median_ms']:.1f} ({row['compare_engine']})",
        f"{row['model_times']['median_ms']:.1f}",
        _ratio(row) + _star(bench, f"native-against-others {setting}"),
        _ratio(same) + _star(bench, f"native {setting}"),
    ]


def _best(bench: dict, row: dict) -> str:
    """The ratio of the best engine for each network, and which these are."""
    best = next(found for found in bench["best"] if _setting(found) == _setting(row))
    engines = [best["model_engine"], best["compare_engine"]]
    ours = engines == ["native", "native"]
    label = f"{'native' if ours else 'best'} {best['precision']} batch {best['batch']}"
    return f"{_ratio(best)}{_star(bench, label)}, {'both on ours' if ours else ' against '.join(engines)}"


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
    benches = [newest(f"*-bench-plain{depth}.json", MACHINE) for depth in (18, 34)]
    rows = [
        [
            " and ".join(network["name"] for network in bench["networks"]),
            *_against_others(bench, bench["native_against_others"][0]),
        ]
        for bench in benches
    ]
    header = [
        "bf16, batch 1",
        "ResNet on OpenVINO, ms",
        "plain on ours, ms",
        "faster by (95% interval)",
        "faster when both are on ours",
    ]
    sources = " ".join(provenance(bench, "compare_basic.sh") for bench in benches)
    return f"{markdown(header, rows)}\n\n{STAR} {sources}"


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
    rows = [
        [f"{model}, {precision}, batch {batch}", *(_ratio(found[model, precision, batch, name]) for name in names)]
        for model, precision, batch in settings
    ]
    environment = document["environment"]
    source = (
        "Time of each plan / time of the default plan, interleaved: above 1, the default is faster. "
        f"{environment['threads']} threads of {environment['cpu']['model']}, {environment['date'][:10]}; load "
        f"{environment['load_average'][0]:.2f} when it began. From `{document['path']}`, made by "
        "`benchmarks/engine_ablation.py`."
    )
    return f"{markdown(['', *names], rows)}\n\n{source}"


def _is_bf16_single(row: dict) -> bool:
    return (row["precision"], row["batch"]) == ("bf16", 1)


def profile() -> str:
    """Every step of plain-50 on our engine in bf16 at batch 1, against this machine's limits."""
    bench = newest("*-bench-plain50.json", MACHINE)
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


def agreement() -> str:
    """Top-1 agreement of the compiled engine with torch on trained networks."""
    document = newest("*-native-agreement.json", MACHINE)
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


def _predicted() -> tuple[dict, dict[tuple, dict]]:
    """The committed predictions, and their plans by network, fusion and batch."""
    document = newest("*-predictions.json")
    return document, {(plan["network"], plan["fusion"], plan["batch"]): plan for plan in document["plans"]}


def predictions() -> str:
    """What the model says of both networks on the cuda engine."""
    document, plans = _predicted()
    rows = []
    for batch in sorted({batch for *_, batch in plans}):
        plain, residual = plans["plain50", "auto", batch], plans["resnet50", "auto", batch]
        layers = plans["plain50", "never", batch]
        limits = Counter()
        for step in plain["steps"]:
            limits[step["limit"]] += step["us"]
        rows.append(
            [
                f"batch {batch}",
                f"{residual['us']:,.0f} ({residual['launches']})",
                f"{plain['us']:,.0f} ({plain['launches']})",
                f"{residual['us'] / plain['us']:.2f}x",
                f"{layers['us'] / plain['us']:.2f}x",
                ", ".join(f"{limit} {us / plain['us']:.0%}" for limit, us in limits.most_common(3)),
            ]
        )
    header = [
        "fp16",
        "resnet50, µs (launches)",
        "plain50, µs (launches)",
        "resnet50 / plain50",
        "plain50 layer by layer / plain50",
        "what limits plain50",
    ]
    source = (
        f"A model's, for one {document['card']['name']}, both networks on the cuda engine; nothing here was measured. "
        "What limits: in the blocks of the busiest multiprocessor, by the steps' time. "
        f"From `{document['path']}`, made by `benchmarks/gpu_predictions.py`."
    )
    return f"{markdown(header, rows)}\n\n{source}"


def gpu_maps() -> str:
    """Feature maps of the cuda engine's plans."""
    document, plans = _predicted()
    least = plans["resnet50", "never", 1]["feature_map_bytes"]
    rows = []
    for network, fusion, what in (
        ("resnet50", "never", "resnet50, the optimum: sums in place"),
        ("resnet50", "auto", "resnet50, as planned"),
        ("plain50", "never", "plain50, layer by layer"),
        ("plain50", "always", "plain50, fused"),
        ("plain50", "auto", "plain50, as planned"),
    ):
        cells = []
        for batch in (1, 32):
            plan = plans[network, fusion, batch]
            cells += [f"{plan['feature_map_bytes']:,}", f"{plan['arena_bytes']:,}"]
        rows.append([what, *cells, f"{least / plans[network, fusion, 1]['feature_map_bytes']:.2f}x"])
    sizes = [f"{what}, batch {batch}" for batch in (1, 32) for what in ("maps", "arena")]
    header = ["fp16", *sizes, "maps smaller by, batch 1"]
    source = (
        "Bytes. Maps: the most that live at once. Arena: with partial sums and alignment. "
        f"From `{document['path']}`, made by `benchmarks/gpu_predictions.py`."
    )
    return f"{markdown(header, rows)}\n\n{source}"


def resources() -> str:
    """What compiled kernels need, by card."""
    document = newest("*-gpu-resources.json")
    kernels = [dict(zip(document["columns"], row, strict=True)) for row in document["rows"]]
    rows = []
    for card in dict.fromkeys(row["card"] for row in kernels):
        found = [row for row in kernels if row["card"] == card]
        rows.append(
            [
                f"{card}, sm_{found[0]['capability']}",
                str(len(found)),
                str(max(row["registers"] for row in found)),
                f"{max(row['shared'] for row in found) / 1024:.0f} of {found[0]['limit'] / 1024:.0f}",
                str(sum(row["spilled"] > 0 for row in found)),
                str(sum(row["serialized"] for row in found)),
                ", ".join(sorted({row["tensor_ops"] for row in found} - {""})),
                ", ".join(sorted({row["assembler"] for row in found})),
            ]
        )
    header = ["card", "kernels", "most registers", "most shared memory, KiB", "that spill", "serialized", "products by"]
    header.append("ptxas")
    source = (
        f"Kernels of the plans that the model chooses for plain-50 and ResNet-50, {document['what']}, compiled by "
        f"triton {document['triton']}. From "
        f"`{document['path']}`, made by `benchmarks/gpu_resources.py`."
    )
    return f"{markdown(header, rows)}\n\n{source}"


def trt_memory() -> str:
    """Activation memory of both networks by TensorRT-RTX's builder, one batch size each and a range."""
    result = newest("*-trt-memory.json")
    rows = {(row["network"], row["precision"], tuple(row["profile"])): row for row in result["rows"]}
    lines = []
    for network, precision, profile in rows:
        if network != "plain50":
            continue
        plain, residual = (rows[name, precision, profile] for name in ("plain50", "resnet50"))
        maps = [row["activation_bytes"] for row in (residual, plain)]
        lines.append(
            [
                f"{precision}, batch {profile[0] if profile[0] == profile[2] else ':'.join(map(str, profile))}",
                *(f"{size / 1e6:.1f}" for size in maps),
                f"{maps[0] / maps[1]:.2f}x",
                f"{residual['ledger_bytes'] / plain['ledger_bytes']:.2f}x",
                f"{residual['layers']} / {plain['layers']}",
                f"{residual['reformats']} / {plain['reformats']}",
                f"{residual['widened']} / {plain['widened']}",
            ]
        )
    header = ["224x224", "resnet50, MB", "plain50, MB", "smaller by", "by the ledger, in-place"]
    header += ["layers", "copies and conversions", "8-bit layers that write wider maps"]
    source = (
        f"Activation memory as the builder of {result['builder']} plans it for {result['target']}, workspaces included "
        f"(8.2 MB at least); nothing was run. {result['date']}, from `{result['path']}`, made by "
        "`benchmarks/trt_memory.py`."
    )
    return f"{markdown(header, lines)}\n\n{source}"


def quantised() -> str:
    """Accuracy of trained networks in fp32, int8 and fp8 on the test images."""
    result = newest("*-int8-accuracy.json")
    rows = {(row["model"].split(",")[0], row["precision"]): row for row in result["results"]}
    lines = []
    for name in dict.fromkeys(name for name, _ in rows):
        cells = [f"{rows[name, 'int8']['gate']['original_accuracy']:.2%}"]
        for kind in ("int8", "fp8"):
            gate = rows[name, kind]["gate"]
            cells += [f"{gate['accuracy']:.2%}", f"{gate['drop_points']:.2f}", rows[name, kind]["calibrator"]]
        lines.append([name, *cells])
    header = ["network", "fp32", *(text for kind in ("int8", "fp8") for text in (kind, "points lost", "calibrator"))]
    first = result["results"][0]
    packages, images = first["environment"]["packages"], first["gate"]["images"]
    source = (
        f"{images:,} test images of Fashion-MNIST, ONE training each (seed 0), ONNX Runtime {packages['onnxruntime']}, "
        "Q/DQ computed literally; losses this small are noise in either direction. "
        f"{result['date'][:10]}, from `{result['path']}`, made by `benchmarks/int8_accuracy.py`."
    )
    return f"{markdown(header, lines)}\n\n{source}"


def calibrators() -> str:
    """Accuracy by calibrator on the images that chose it."""
    result = newest("*-int8-accuracy.json")
    found = [
        (row["model"].split(",")[0], row["precision"], entry["calibrator"], entry["accuracy"])
        for row in result["results"]
        for entry in row["calibrators"]
    ]
    columns = list(dict.fromkeys((kind, name) for _, kind, name, _ in found))
    accuracy = {(network, kind, name): value for network, kind, name, value in found}
    lines = [
        [network, *(f"{accuracy[network, kind, name]:.2%}" for kind, name in columns)]
        for network in dict.fromkeys(network for network, *_ in found)
    ]
    return markdown(["accuracy", *(f"{kind}, {name}" for kind, name in columns)], lines)


def qdq() -> str:
    """Q and DQ nodes of plain networks and their ResNets."""
    counts = newest("*-trt-memory.json")["qdq"]
    keys = ("quantize_nodes", "dequantize_nodes", "added_operands", "feature_maps_only_added")
    lines = [
        [f"{plain} / {residual}", *(f"{counts[plain][key]} / {counts[residual][key]}" for key in keys)]
        for plain, residual in zip(*[iter(counts)] * 2, strict=True)
    ]
    header = ["int8", "Q, of feature maps", "DQ, with those of weights", "operands of Add through DQ"]
    return markdown([*header, "pairs that only an Add needs"], lines)


PAGES = {
    "README.md": {
        "speed": speed,
        "native": native,
        "memory": memory,
        "predictions": predictions,
        "accuracy": short,
    },
    "docs/engine.md": {
        "native": native,
        "machines": machines,
        "basic": native_basic,
        "arena": native_memory,
        "ablation": ablation,
        "agreement": agreement,
        "profile": profile,
    },
    "docs/gpu.md": {"predictions": predictions, "maps": gpu_maps, "resources": resources},
    "docs/accuracy.md": {f"accuracy-{name}": experiment(name) for name in EXPERIMENTS},
    "docs/tensorrt.md": {"trt-memory": trt_memory},
    "docs/quantization.md": {"quantised": quantised, "calibrators": calibrators, "qdq": qdq},
}


def filled(page: str, text: str) -> str:
    """A page's text with every table made anew."""
    for name, make in PAGES[page].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no markers for the table '{name}'")
        table = make()
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def text_of(page: str) -> str | None:
    """The text around a page's tables: the page's own; that of accuracy's is its template's, once there are results."""
    if page == "docs/accuracy.md":
        found = any(find(f"*-accuracy-{name}.json") for name in EXPERIMENTS)
        return (ROOT / "benchmarks" / "accuracy" / "page.md").read_text(encoding="utf-8") if found else None
    return (ROOT / page).read_text(encoding="utf-8")


def main() -> int:
    """Rewrite or check."""
    differing = []
    for page in PAGES:
        path = ROOT / page
        text = text_of(page)
        if text is None:
            continue
        after = filled(page, text)
        if path.exists() and after == path.read_text(encoding="utf-8"):
            continue
        differing.append(page)
        if "--check" not in sys.argv[1:]:
            path.write_text(after, encoding="utf-8")
    if "--check" not in sys.argv[1:]:
        return 0
    print(
        f"{', '.join(differing)} differs: run benchmarks/tables.py"
        if differing
        else "the pages say what the results say"
    )
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
