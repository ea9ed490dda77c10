"""The log of a run (what a resume makes of it is tested with the loop)."""

import pytest

from rd_train.metrics import bottleneck


@pytest.mark.parametrize(("loader", "slower"), [(812.0, "model"), (500.0, "loader")])
def test_the_slower_one_is_the_bottleneck(loader, slower):
    line = bottleneck({"loader_images_per_second": loader, "model_images_per_second": 640.4})
    assert line == f"loader {loader:.0f} img/s, model 640 img/s: the {slower} is the bottleneck"
