"""The tables of README.md and the pages under docs/, made from the committed results: none is typed by hand.

python benchmarks/tables.py            rewrite the tables between the markers
python benchmarks/tables.py --check    exit 1 where a page differs (a test runs this)
"""

import argparse
import re
import sys

import cpu_tables
import gpu_tables
import quantization_tables
from accuracy_tables import CHOICES, RESULTS, choice, experiment, short, short_differences, sources
from committed import ROOT

PAGES = {
    "README.md": {
        "speed-summary": cpu_tables.speed_summary,
        "memory-summary": cpu_tables.memory_summary,
        "accuracy": short,
        "accuracy-differences": short_differences,
    },
    "docs/results.md": {
        "speed": cpu_tables.speed,
        "machines": cpu_tables.machines,
        "basic": cpu_tables.native_basic,
        "memory": cpu_tables.memory,
        "arena": cpu_tables.native_memory,
    },
    "docs/engine.md": {
        "ablation": cpu_tables.ablation,
        "agreement": cpu_tables.agreement,
        "profile": cpu_tables.profile,
        "amx-agreement": cpu_tables.amx_agreement,
        "amx-profile": cpu_tables.amx_profile,
        "amx-tiles": cpu_tables.amx_tiles,
    },
    "docs/gpu.md": {
        "predictions": gpu_tables.predictions,
        "maps": gpu_tables.gpu_maps,
        "resources": gpu_tables.resources,
    },
    "docs/accuracy.md": {**{f"accuracy-{name}": experiment(name) for name in RESULTS}, "accuracy-sources": sources},
    "docs/accuracy-choice.md": {
        **{f"accuracy-{name}": experiment(name, "accuracy.md") for name in CHOICES},
        "accuracy-choice": choice,
    },
    "docs/training-reference.md": {"loader": cpu_tables.loader},
    "docs/tensorrt.md": {"trt-memory": gpu_tables.trt_memory},
    "docs/quantization.md": {
        "quantised": quantization_tables.quantised,
        "calibrators": quantization_tables.calibrators,
        "qdq": quantization_tables.qdq,
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page differs")
    check = parser.parse_args().check
    differing = []
    for page in PAGES:
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = filled(page, before)
        if after == before:
            continue
        differing.append(page)
        if not check:
            path.write_text(after, encoding="utf-8")
    if not check:
        return 0
    print(
        f"{', '.join(differing)} differs: run benchmarks/tables.py"
        if differing
        else "the pages say what the results say"
    )
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
