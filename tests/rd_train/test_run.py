"""What a run makes of its recipe before it trains."""

from dataclasses import replace

import pytest
import torch

from rd_train.checkpoint import load_checkpoint
from rd_train.data import fixed_sample, load_dataset
from rd_train.recipe import Recipe
from rd_train.run import run

# Steps too small to change a weight.
STILL = Recipe(
    method="ce", arch="plain20", width=0.25, epochs=1, batch_size=50, lr=1e-12, warmup_epochs=0.5, train_limit=200,
    precision="fp32", device="cpu", threads=1, init_noise=0.0,
)  # fmt: skip


@pytest.mark.parametrize("init", ["identity", "dirac"])
def test_only_an_identity_start_passes_images_on(tmp_path, init):
    run(replace(STILL, init=init), tmp_path)
    network = load_checkpoint(tmp_path / "model.pt").network().train()
    split = load_dataset("digits", limit=200).train
    with torch.no_grad():
        x = network.stem(split.images(fixed_sample(split, 50)))
        for block in network.stage_blocks(0):
            x = block(x.relu())
        first = network.stem(split.images(fixed_sample(split, 50)))
    same = torch.allclose(x.relu(), first.relu(), atol=1e-3)
    assert same == (init == "identity")
