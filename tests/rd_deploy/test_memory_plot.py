"""The picture of feature-map ledgers: a readable PNG or nothing."""

import pytest
from matplotlib.image import imread

from rd_deploy.bench.memory_plot import draw_ledgers, plot_ledgers
from rd_deploy.common import UserError
from rd_deploy.memory import Ledger, LedgerStep


def example(scale: int, held: int) -> Ledger:
    steps = [
        LedgerStep(f"conv{number}", "Conv", scale * live, held * number, 0, 0) for number, live in enumerate((1, 4, 2))
    ]
    return Ledger("separate", 1, 4, tuple(steps), best_order=True)


@pytest.mark.parametrize("scale", [100, 1 << 20])
def test_plot_is_a_png_that_shades_what_shortcuts_hold(tmp_path, scale):
    images = []
    for held in (0, scale // 2):
        pair = {"resnet": example(scale, held), "plain": example(scale // 2, 0)}
        plot_ledgers(tmp_path / "plot.png", {"separate": pair, "in-place": pair})
        images.append(imread(tmp_path / "plot.png")[..., :3])
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    assert images[0].shape == images[1].shape
    assert min(images[0].shape[:2]) > 500
    plain, shaded = (
        (abs(image - (0.96, 0.84, 0.75)).max(axis=2) < 0.03).mean() for image in images
    )  # a quarter of #D55E00
    assert shaded > plain + 0.02


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        plot_ledgers(tmp_path / "file" / "plot.png", {"separate": {"a": example(1, 0)}})


def test_panels_share_one_unit_and_scale():
    """One network needs MiB, the other KiB: both panels are in MiB, and each curve has its own bytes."""
    from matplotlib.figure import Figure

    panels = Figure().subplots(2)
    draw_ledgers(panels, {"separate": {"large": example(1 << 20, 0)}, "in-place": {"small": example(1 << 10, 0)}})
    assert {panel.get_ylabel() for panel in panels} == {"live feature maps (MiB)"}
    assert len({panel.get_ylim() for panel in panels}) == 1
    for panel, unit in zip(panels, (1, 2**-10), strict=True):
        assert list(panel.patches[0].get_data().values) == [1 * unit, 4 * unit, 2 * unit]
