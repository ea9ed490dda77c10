"""Tables of 8-bit accuracy and of Q and DQ nodes."""

from committed import markdown, newest


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
    environments = [row["environment"] for row in result["results"]]
    versions = sorted({each["packages"]["onnxruntime"] for each in environments})
    dates = sorted({each["date"][:10] for each in environments})
    commits = sorted({str(each["git_commit"]) for each in environments})
    images = result["results"][0]["gate"]["images"]
    source = (
        f"{images:,} test images of Fashion-MNIST, ONE training each (seed 0), ONNX Runtime {' and '.join(versions)}, "
        "Q/DQ computed literally; losses this small are noise in either direction. "
        f"{' and '.join(dates)}, by commit {' and '.join(commits)}. From `{result['path']}`, made by "
        "`benchmarks/int8_accuracy.py`."
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
