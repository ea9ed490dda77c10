"""Tables of the cuda engine's predictions and resources, and of TensorRT's memory."""

from collections import Counter

from committed import markdown, newest


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
