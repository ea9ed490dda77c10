"""The tables of README.md and docs/engine.md, made from the committed results, so that no figure is typed by hand.

python benchmarks/tables.py            rewrite the tables between the markers
python benchmarks/tables.py --check    exit 1 where a page differs (a test runs this)
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def newest(pattern: str) -> dict:
    """The latest committed result of a kind; names begin with their date."""
    paths = sorted(RESULTS.glob(f"*/{pattern}"), key=lambda path: path.name)
    if not paths:
        raise SystemExit(f"no {pattern} under {RESULTS}; make it with the script that the README names")
    return json.loads(paths[-1].read_text(encoding="utf-8")) | {"path": paths[-1].relative_to(ROOT).as_posix()}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance(bench: dict, script: str = "benchmarks/compare_resnet50.sh") -> str:
    """Machine, versions, date and script of a committed bench.json."""
    environment = bench["environment"]
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "onnxruntime", "openvino"))
    return (
        f"{environment['threads']} threads of {environment['cpu']['model']}, {versions}, {environment['date'][:10]}. "
        f"From `{bench['path']}`, made by `{script}`."
    )


def speed() -> str:
    """Latency of both networks per engine, and the paired ratio with its interval."""
    bench = newest("*-bench-plain50.json")
    times = {(row["model"], row["engine"], row["precision"], row["batch"]): row for row in bench["results"]}
    model, compare = (network["name"] for network in bench["networks"])
    rows = []
    for ratio in bench["ratios"]:
        key = (ratio["engine"], ratio["precision"], ratio["batch"])
        warned = any(text.startswith(f"{key[0]} {key[1]} batch {key[2]}:") for text in bench["warnings"])
        rows.append(
            [
                f"{key[0]} {key[1]}, batch {key[2]}{' *' if warned else ''}",
                f"{times[(compare, *key)]['median_ms']:.1f}",
                f"{times[(model, *key)]['median_ms']:.1f}",
                _ratio(ratio),
                str(len(times[(model, *key)]["samples_ms"]) // 2),
            ]
        )
    header = ["engine", f"{compare}, ms per batch", f"{model}, ms per batch", "faster by (95% interval)", "quads"]
    source = (
        "Medians, 224x224, random weights, host to host. The ratio is the median over interleaved quads, not the "
        f"quotient of the columns. *: unsteady times, see `warnings` in the file. {provenance(bench)}"
    )
    return f"{markdown(header, rows)}\n\n{source}"


def memory() -> str:
    """Peak feature maps of both networks in fp32, by whose account, at batch 1 and the ratio at every batch."""
    bench = newest("*-bench-plain50.json")
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
    return f"{markdown(header, rows)}\n\nfp32, 224x224. {provenance(bench)}"


def accuracy() -> str:
    """Test accuracy by method and initialisation, for both depths."""
    document = newest("*-accuracy-fashion.json")
    results = {row["name"]: row for row in document["results"]}

    def cell(name: str) -> str:
        return f"{100 * results[name]['test_accuracy']:.2f}%"

    rows = [
        [
            "ResNet, cross-entropy (the teacher)",
            cell("resnet20"),
            cell("resnet56"),
            f"{results['resnet20']['step_cost']:.2f}",
        ]
    ]
    for method in ("ce", "kd", "jointrd"):
        for init in ("kaiming", "dirac"):
            names = [f"plain{depth}-{method}-{init}" for depth in (20, 56)]
            rows.append([f"plain, {method}, {init}", *map(cell, names), f"{results[names[0]]['step_cost']:.2f}"])
    epochs = [results[f"resnet{depth}"]["epochs"] for depth in (20, 56)]
    header = [
        "network, method, initialisation",
        f"depth 20, {epochs[0]} epochs",
        f"depth 56, {epochs[1]} epoch(s)",
        "cost of a step",
    ]
    source = (
        f"Test accuracy on the 10,000 test images of the full Fashion-MNIST, ONE seed ({results['resnet20']['seed']}), "
        f"{results['resnet20']['precision']}, {document['machine']['cpu']}, {document['date']}, commit "
        f"{document['commit']}: differences below a few points mean nothing yet. {document['note']} "
        f"From `{document['path']}`, made by `benchmarks/accuracy/fashion.py`."
    ).replace("  ", " ")
    return f"{markdown(header, rows)}\n\n{source}"


def native() -> str:
    """plain-50 on our engine against ResNet-50 on the best of the others, and both networks on our engine."""
    bench = newest("*-bench-plain50.json")
    model, compare = (network["name"] for network in bench["networks"])
    times = {(row["model"], row["engine"], row["precision"], row["batch"]): row for row in bench["results"]}
    same = {(row["precision"], row["batch"]): row for row in bench["ratios"] if row["engine"] == "native"}
    rows = []
    for row in bench["native_against_others"]:
        setting = (row["precision"], row["batch"])
        ours = times[model, "native", *setting]["median_ms"]
        theirs, others = times[compare, "native", *setting], times[compare, row["compare_engine"], *setting]
        rows.append(
            [
                f"{setting[0]}, batch {setting[1]}",
                f"{others['median_ms']:.1f} ({row['compare_engine']})",
                f"{theirs['median_ms']:.1f}",
                f"{ours:.1f}",
                _ratio(row),
                _ratio(same[setting]),
            ]
        )
    header = [
        "",
        f"{compare}, best other engine, ms",
        f"{compare}, native, ms",
        f"{model}, native, ms",
        "faster than on the best other",
        "faster, both native",
    ]
    kinds = sorted({f"{row['precision']}: {row['variant']}" for row in same.values()})
    return f"{markdown(header, rows)}\n\nInstruction sets: {', '.join(kinds)}. {provenance(bench)}"


def _ratio(row: dict) -> str:
    return f"{row['ratio']:.2f}x ({row['low']:.2f} to {row['high']:.2f})"


def native_basic() -> str:
    """The networks of basic blocks, whose maps are all narrow: plain-18 and plain-34 against their ResNets."""
    rows, last = [], None
    for depth in (18, 34):
        bench = last = newest(f"*-bench-plain{depth}.json")
        times = {(row["model"], row["engine"]): row["median_ms"] for row in bench["results"]}
        across = bench["native_against_others"][0]
        model, compare = (network["name"] for network in bench["networks"])
        rows.append(
            [
                f"{model} and {compare}",
                f"{times[compare, across['compare_engine']]:.1f} ({across['compare_engine']})",
                f"{times[compare, 'native']:.1f}",
                f"{times[model, 'native']:.1f}",
                _ratio(across),
                _ratio(next(row for row in bench["ratios"] if row["engine"] == "native")),
            ]
        )
    header = [
        "bf16, batch 1",
        "ResNet, best other engine, ms",
        "ResNet, native, ms",
        "plain, native, ms",
        "faster than on the best other",
        "faster, both native",
    ]
    return f"{markdown(header, rows)}\n\n{provenance(last, 'benchmarks/compare_basic.sh')}"


def native_memory() -> str:
    """Arena of plain-50 in bf16 at batch 1, by what it consists of, against ResNet-50's optimal plan."""
    bench = newest("*-bench-plain50.json")
    model, compare = (network["name"] for network in bench["networks"])
    peaks = {(row["model"], row["source"]): row["peak_bytes"] for row in bench["memory"] if _is_bf16_single(row)}
    best = peaks[compare, "ledger, in-place"]
    memory = next(row for row in bench["profiles"] if row["model"] == model and _is_bf16_single(row))["memory"]
    rows = [
        [f"{compare}, optimal plan (maps alone)", str(best), "-", "-", "1.00x"],
        [
            f"{model}, native",
            f"{memory['arena_bytes']}",
            f"{memory['feature_map_bytes']}",
            f"{memory['scratch_bytes']} + {memory['alignment_bytes']}",
            f"{best / memory['arena_bytes']:.2f}x",
        ],
    ]
    small = peaks[model, "native small arena"]
    rows.append([f"{model}, native, `RD_FLAG_SMALL`", str(small), "-", "-", f"{best / small:.2f}x"])
    header = ["bf16, batch 1", "bytes in all", "of which maps", "scratch + alignment", "smaller by"]
    return f"{markdown(header, rows)}\n\n{provenance(bench)}"


def _is_bf16_single(row: dict) -> bool:
    return (row["precision"], row["batch"]) == ("bf16", 1)


def profile() -> str:
    """Every step of plain-50 on our engine in bf16 at batch 1, against this machine's limits."""
    bench = newest("*-bench-plain50.json")
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
    header = ["step", "ms", "GFLOP/s done", "as a direct convolution", "share of the limit"]
    limits = entry["limits"]
    source = (
        f"Medians of {entry['runs']} runs. Limits, measured in the same run: {limits['gflops']:.0f} GFLOP/s of matrix "
        f"products in the first cache, {limits['network_gb_s']:.0f} GB/s reading as many bytes as a run touches. "
        "The limit of a step is the longer of its arithmetic and of reading its weights and maps."
    )
    return f"{markdown(header, rows)}\n\n{source} {provenance(bench)}"


def agreement() -> str:
    """Top-1 agreement of the compiled engine with torch on trained networks."""
    document = newest("*-native-agreement.json")
    rows = [
        [
            f"{row['model']}, {row['plan']} ({row['isa']})",
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
        "The error is that of a logit, in standard deviations of the logits. "
        f"{document['environment']['cpu']['model']}, {document['date']}. From `{document['path']}`, made by "
        "`benchmarks/native_agreement.py`."
    )
    return f"{markdown(header, rows)}\n\n{source}"


PAGES = {
    "README.md": {"speed": speed, "native": native, "memory": memory, "accuracy": accuracy},
    "docs/engine.md": {
        "native": native,
        "basic": native_basic,
        "arena": native_memory,
        "agreement": agreement,
        "profile": profile,
    },
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


def main() -> int:
    """Rewrite or check."""
    differing = []
    for page in PAGES:
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = filled(page, before)
        if after == before:
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
