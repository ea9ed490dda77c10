"""The README's tables, made from the committed results, so that no figure in it is typed by hand.

python benchmarks/tables.py            rewrite the tables between the README's markers
python benchmarks/tables.py --check    exit 1 where the README differs (a test runs this)
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


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


def provenance(bench: dict) -> str:
    """Machine, versions, date and script of a committed bench.json."""
    environment = bench["environment"]
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "onnxruntime", "openvino"))
    return (
        f"{environment['threads']} threads of {environment['cpu']['model']}, {versions}, {environment['date'][:10]}. "
        f"From `{bench['path']}`, made by `benchmarks/compare_resnet50.sh`."
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
                f"{ratio['ratio']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})",
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


TABLES = {"speed": speed, "memory": memory, "accuracy": accuracy}


def filled(text: str) -> str:
    """The README's text with every table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no markers for the table '{name}'")
        table = make()
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def main() -> int:
    """Rewrite or check."""
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        print("README.md is what the results say" if after == before else "README.md differs: run benchmarks/tables.py")
        return int(after != before)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
