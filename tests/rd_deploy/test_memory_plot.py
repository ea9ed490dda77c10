"""The picture of feature-map ledgers: a readable PNG or nothing."""

import pytest
from matplotlib.image import imread

from rd_deploy.bench.memory_plot import plot_ledgers
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
        plot_ledgers(tmp_path / "plot.png", {"resnet": example(scale, held), "plain": example(scale // 2, 0)})
        images.append(imread(tmp_path / "plot.png")[..., :3])
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    assert images[0].shape == images[1].shape
    assert min(images[0].shape[:2]) > 500
    plain, shaded = (
        (abs(image - (0.96, 0.84, 0.75)).max(axis=2) < 0.03).mean() for image in images
    )  # a quarter of #D55E00
    assert shaded > plain + 0.02


def test_bad_calls_are_one_line(tmp_path):
    with pytest.raises(UserError, match="1 to 4 networks"):
        plot_ledgers(tmp_path / "plot.png", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        plot_ledgers(tmp_path / "file" / "plot.png", {"a": example(1, 0)})
