#!/bin/sh
# The tables of speed and memory, in fp32 those of all machines too (docs/development.md): plain-50 against ResNet-50 on every engine. Leave the machine alone meanwhile.
# Usage: benchmarks/compare_resnet50.sh MACHINE    (names the folder under benchmarks/results)
# PRECISION=fp32 leaves bf16 out, for CPUs without its instructions, on which torch's bf16 takes many times longer.
# RD_ISA=amx_bf16x2 PRECISION=fp32 has ours use that instruction set, in a file of its own beside the usual one.
set -eu
: "${1:?usage: $0 MACHINE}"
results="$(dirname "$0")/results/$1"
out="${OUT:-runs/bench-plain50}"
rd-bench plain50 --compare resnet50 --engines torch,onnxruntime,openvino,native --batch 1,8 --precision "${PRECISION:-fp32,bf16}" \
    --profile --seconds "${SECONDS_PER_PAIR:-20}" --out "$out"
mkdir -p "$results"
file="$results/$(date +%F)-bench-plain50${RD_ISA:+-$RD_ISA}.json"
cp "$out/bench.json" "$file"
echo "wrote $file; next: python benchmarks/tables.py"
