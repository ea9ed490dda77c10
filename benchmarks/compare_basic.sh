#!/bin/sh
# The table of basic blocks in docs/engine.md: plain-18 and plain-34 against their ResNets. Leave the machine alone meanwhile.
# Usage: benchmarks/compare_basic.sh MACHINE    (names the folder under benchmarks/results)
set -eu
: "${1:?usage: $0 MACHINE}"
results="$(dirname "$0")/results/$1"
mkdir -p "$results"
for depth in 18 34; do
    out="runs/bench-plain$depth"
    rd-bench "plain$depth" --compare "resnet$depth" --engines openvino,native --batch 1 --precision bf16 \
        --seconds "${SECONDS_PER_PAIR:-20}" --out "$out"
    cp "$out/bench.json" "$results/$(date +%F)-bench-plain$depth.json"
done
echo "wrote $results/$(date +%F)-bench-plain18.json and -plain34.json; next: python benchmarks/tables.py"
