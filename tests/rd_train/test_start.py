"""What a fine-tuning starts from: published ResNets by name and in files, and everything that must be refused."""

from dataclasses import replace

import pytest
import torch
import torchvision
from photographs import write_imagenet

from rd_deploy.common import UserError, run_command
from rd_train.checkpoint import load_checkpoint
from rd_train.cli import command
from rd_train.encoded import IMAGENET_MEAN, IMAGENET_STD
from rd_train.networks import Network, parse_arch
from rd_train.plan import settle
from rd_train.recipe import Recipe
from rd_train.start import load_start
from rd_train.teachers import look_up, parse_published


def weights(name: str, classes: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return torchvision.models.get_model(name, num_classes=classes).state_dict()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("counters", [True, False])
def test_a_file_of_torchvisions_weights_is_known_by_its_blocks(tmp_path, name, counters):
    theirs = torchvision.models.get_model(name, num_classes=4).eval()
    state = {key: value for key, value in theirs.state_dict().items() if counters or "num_batches" not in key}
    torch.save(state, tmp_path / "weights.pth")
    start = load_start(str(tmp_path / "weights.pth"))
    assert start.arch == parse_arch(name, classes=4)
    assert (start.preprocessing.mean, start.preprocessing.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert (start.preprocessing.size, start.preprocessing.resize, len(start.classes)) == (224, 256, 4)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(start.network()(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torchvision's resnet18, by name, is a file of ours, normalised in a way of its own."""
    torch.save(weights("resnet18"), tmp_path / "hub.pth")
    record = replace(look_up(parse_published("torchvision/resnet18")), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    monkeypatch.setattr("rd_train.teachers._torchvision_record", lambda published: record)

    def fetched(address, **options):
        assert (address, options["check_hash"], options["weights_only"]) == (record.place, True, True)
        return torch.load(tmp_path / "hub.pth", weights_only=True)

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fetched)


def test_a_published_network_is_fine_tuned_by_its_name(hub, tmp_path, capsys):
    write_imagenet(tmp_path / "data", train=14)
    flags = [
        "--data-dir",
        str(tmp_path / "data"),
        "--size",
        "32",
        "--epochs",
        "1",
        "--batch-size",
        "10",
        "--lr",
        "1e-12",
    ]
    flags += ["--warmup-epochs", "0.5", "--workers", "0", "--out", str(tmp_path / "run")]
    assert run_command("rd-train", lambda: command(["finetune", "torchvision/resnet18", *flags])) == 0
    assert "start    torchvision/resnet18.IMAGENET1K_V1, with a new classifier of 2" in capsys.readouterr().out
    kept = load_checkpoint(tmp_path / "run" / "model.pt")
    assert kept.arch == parse_arch("resnet18", classes=2)
    assert (kept.preprocessing.mean, kept.preprocessing.size) == ((0.1, 0.2, 0.3), 32)
    torch.testing.assert_close(kept.state_dict["layer4.1.conv2.weight"], weights("resnet18")["layer4.1.conv2.weight"])


def test_its_weights_are_settled_and_stay_so(hub):
    recipe = settle(Recipe(method="ce", data="folder", start_weights="torchvision/resnet18", device="cpu"))
    assert (recipe.start_weights, recipe.arch) == ("torchvision/resnet18.IMAGENET1K_V1", "resnet18")
    assert settle(recipe) == recipe


def changed(state: dict, **changes) -> dict:
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"format": "another/1"}, "not a residual-distillation/1 checkpoint"),
        (lambda: [1], "neither a model.pt nor a state_dict"),
        (lambda: {1: torch.zeros(1)}, "neither a model.pt nor a state_dict"),
        (lambda: Network(parse_arch("plain20", classes=3)).state_dict(), "one of resnet18, resnet34"),
        (lambda: weights("wide_resnet50_2"), "the architecture needs"),
        (lambda: changed(weights("resnet18"), **{"fc.weight": None}), "one of resnet18"),
        (lambda: changed(weights("resnet18"), **{"fc.weight": torch.zeros(4)}), "one of resnet18"),
        (lambda: changed(weights("resnet18"), **{"fc.weight": torch.zeros(1, 512)}), "classes must be from 2"),
        (
            lambda: changed(weights("resnet18"), **{"fc.weight": torch.zeros(1).expand(9_000_000, 512)}),
            "classes must be",
        ),
        (lambda: changed(weights("resnet18"), **{"fc.weight": torch.zeros(1).expand(4, 512)}), "repeats its values"),
        (lambda: changed(weights("resnet18"), **{"conv1.weight": torch.zeros(64, 3, 3, 3)}), "has shape"),
        (lambda: changed(weights("resnet18"), **{"layer2.9.bn1.weight": torch.zeros(128)}), "one of resnet18"),
    ],
)
def test_what_is_no_start_is_one_line(tmp_path, make, message):
    torch.save(make(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message) as error:
        load_start(str(tmp_path / "weights.pth"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("torchvision/resnext50_32x4d", "^start_weights 'torchvision/resnext50_32x4d' is not one of resnet18"),
        ("torchvision/best.pth", "^start_weights torchvision/best.pth does not exist"),
        ("nowhere/resnet18", "does not exist"),
        ("torchvision/resnet18.NOTHING", "no weights NOTHING"),
    ],
)
def test_unknown_names_are_one_line(start, message):
    with pytest.raises(UserError, match=message):
        load_start(start)
