"""What ``rd-export`` prints and writes into sidecars about the checks that it made."""

from rd_deploy.chain import Chain
from rd_deploy.export.files import Artefact
from rd_deploy.parity import Run
from rd_deploy.trt.build import Profile


def summary(chain: Chain, precision: str) -> list[str]:
    """What is exported, in two lines."""
    channels, height, width = chain.input_shape
    errors = chain.provenance["fold_errors"]
    worst = max(errors, key=errors.get)
    return [
        f"{chain.name}: {channels}x{height}x{width} to {len(chain.classes)} classes, {precision}, "
        f"{chain.parameters() / 1e6:.2f} M parameters, {chain.macs() / 1e6:.1f} M MACs per image",
        f"BN folded in float64: largest relative error of a layer {errors[worst]:.1e} ({worst})",
    ]


def parity_entry(reference: str, runs: list[Run], origin: str, tolerance: float | None) -> dict:
    """A sidecar's account of a parity check. ``origin``: where the images come from, in words."""
    return {
        "reference": reference,
        "images": origin,
        "tolerance": tolerance,
        "runs": [run.to_dict() for run in runs],
    }


def parity_table(entry: dict) -> list[str]:
    """The same as lines to print."""
    lines = [
        f"parity with {entry['reference']} on {entry['images']};",
        f"errors in standard deviations of the logits, {_limit(entry['tolerance'])}:",
        "  batch  images       max     p99.9      mean   top-1  run by",
    ]
    for run in entry["runs"]:
        errors = f"{run['max_error']:8.1e}  {run['p999_error']:8.1e}  {run['mean_error']:8.1e}"
        agreement = f"{run['top1_agreement']:6.1%}"
        lines.append(f"  {run['batch']:5d}  {run['images']:6d}  {errors}  {agreement}  {run['engine']}")
    return lines


def quantisation_lines(report: dict) -> list[str]:
    """How a network was quantised and what that cost, from `rd_deploy.quantize`'s report."""
    calibration, gate = report["calibration"], report["gate"]
    images = f"{calibration['images']} {calibration['origin']}"
    lines = [f"{report['kind']} by the calibrator {report['calibrator']} on {images}"]
    if gate is None:
        return [*lines, "its accuracy was not judged: random images have no classes"]
    if gate["drop_points"] is None:
        kept = f"{gate['agreement']:.1%} of {gate['images']} {gate['origin']} keep their class"
        return [*lines, f"{kept} (no labels: no gate)"]
    was, now = gate["original_accuracy"], gate["accuracy"]
    drop = f"{gate['drop_points']:.2f} points lost, {gate['max_drop']:g} allowed"
    if 0 < gate["max_drop"] < (one := 100 / gate["images"]):
        drop += f"; one image is {one:.2g} points: more images would tell more"
    return [*lines, f"accuracy on {gate['images']} {gate['origin']}: {now:.2%}, {was:.2%} in fp32 ({drop})"]


def engine_lines(engine: dict, title: str, seconds: float, unseen: str | None) -> list[str]:
    """What the builder said of an engine; ``unseen``: why it was not run here."""
    batches = Profile.from_list(engine["profile"])
    layers = engine["layers"]
    lines = [
        f"engine: {title} for {', '.join(engine['targets'])}, batch {batches}, built in {seconds:.1f} s; "
        + (
            "its builder lists no layers: nothing is known of fusion, nor whether 8 bits are used"
            if layers is None
            else f"{len(layers)} layers, {engine['reformats']} of them copies or conversions"
        ),
        f"by its builder's account: activation memory {_megabytes(engine['activation_bytes'])} at the largest batch, "
        f"weights {_megabytes(engine['weight_bytes'])}",
    ]
    if engine["widened"]:
        lines.append(
            f"{engine['widened']} layers multiply in 8 bits and write wider maps, which others quantise again: 8 bits "
            "save no traffic here, and fp16 is likely to be faster"
        )
    return [*lines, f"the engine was not run: {unseen}"] if unseen else lines


def written(artefact: Artefact) -> str:
    """That a file and its sidecar are there."""
    return f"wrote {artefact.path} ({len(artefact.content) / 1e6:.1f} MB) and {artefact.sidecar_path}"


def _limit(tolerance: float | None) -> str:
    return "no tolerance (random weights)" if tolerance is None else f"tolerance {tolerance:g}"


def _megabytes(size: int | None) -> str:
    return "not said" if size is None else f"{size / 1e6:.1f} MB"
