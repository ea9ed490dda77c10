"""How the cuda engine would run two networks on a card: kernels, blocks, bytes and predicted times, without a GPU."""

from collections.abc import Sequence

from rd_deploy.bench.models import Subject
from rd_deploy.bench.report import table
from rd_deploy.chain_from_onnx import chain_from_onnx
from rd_deploy.common import UserError, require
from rd_deploy.engines import Unsupported

HEADER = ("step", "kernel", "configuration", "blocks", "waves", "MFLOP", "maps KiB", "weights KiB", "limit", "µs")
NOTE = "Predicted by the model of docs/gpu.md, not measured; a card at hand is measured when a network is loaded."


def choose_card(name: str | None, default: str):
    """The card of a name; without one the GPU that is here, or the default. `UserError` if that GPU is too old."""
    require("triton", "cuda")
    from rd_deploy.triton_kernels.cards import get_card

    if name is not None:
        return get_card(name)
    torch = require("torch", "train")
    if not torch.cuda.is_available():
        return get_card(default)
    from rd_deploy.cuda.device import current_card

    try:
        return current_card()
    except Unsupported as reason:
        raise UserError(f"{reason}; name one with --card") from reason


def render_plans(subjects: Sequence[Subject], batches: Sequence[int], card) -> str:
    """Every network's plan at every batch size, and how the networks compare."""
    from rd_deploy.cuda.plan import build_plan
    from rd_deploy.engines.cuda import setting

    fusion = setting("RD_FUSION")
    chains = []
    for subject in subjects:
        try:
            chains.append(chain_from_onnx(subject.model))
        except UserError as reason:
            raise UserError(f"{subject.name}: {reason}") from reason
    parts = [f"cuda engine on {card.name}, fp16 or bf16, RD_FUSION={fusion}. {NOTE}"]
    for batch in batches:
        plans = [build_plan(chain, batch, card, fusion) for chain in chains]
        for subject, plan in zip(subjects, plans, strict=True):
            parts.append(f"## {subject.name}, batch {batch}\n\n{_steps(plan)}\n\n{_totals(plan)}")
        parts.append(_comparison([subject.name for subject in subjects], plans, batch))
    return "\n\n".join(parts)


def _steps(plan) -> str:
    rows = []
    for step in plan.steps:
        work, prediction = step.work, step.prediction
        rows.append(
            (
                *(step.name, step.kernel, step.settings, f"{work.blocks:,}", f"{prediction.waves:.2f}"),
                *(f"{work.flops / 1e6:,.1f}", f"{work.map_bytes / 1024:,.0f}", f"{work.weight_bytes / 1024:,.0f}"),
                *(prediction.limit, f"{prediction.us:,.1f}"),
            )
        )
    return table(HEADER, rows)


def _totals(plan) -> str:
    return (
        f"{len(plan.steps)} launches, {plan.predicted_us:,.0f} µs predicted; feature maps {plan.feature_map_bytes:,} "
        f"bytes, arena {plan.arena_bytes:,} bytes, weights {plan.weight_bytes:,} bytes"
    )


def _comparison(names: list[str], plans: list, batch: int) -> str:
    speed = plans[1].predicted_us / plans[0].predicted_us
    maps = plans[1].feature_map_bytes / plans[0].feature_map_bytes
    return (
        f"Batch {batch}, both on the cuda engine: {names[0]} predicted {speed:.2f}x as fast as {names[1]}, its feature "
        f"maps {maps:.2f}x smaller."
    )
