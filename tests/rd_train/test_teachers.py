"""Published teachers: their logits against the libraries' own networks, and everything that must be refused."""

import hashlib
import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch
import torchvision
from photographs import write_imagenet

from rd_deploy.common import Stopped, UserError, run_command
from rd_deploy.preprocessing import Preprocessing
from rd_train.build import load_teacher, meta_task, teacher_arch
from rd_train.checkpoint import load_checkpoint
from rd_train.cli import command
from rd_train.data import load_dataset
from rd_train.distill import LogitDistillation, ResidualDistillation
from rd_train.encoded import IMAGENET_MEAN, IMAGENET_STD
from rd_train.networks import Network, parse_arch
from rd_train.plan import settle
from rd_train.recipe import Recipe
from rd_train.run import run
from rd_train.teachers import load_published, look_up, parse_published, settled_name

IMAGENET = Preprocessing(64, 73, 3, IMAGENET_MEAN, IMAGENET_STD)
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs the extra [timm]")
needs_safetensors = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="needs [timm]")


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """With BN statistics that a mistake in loading them would change."""
    torch.manual_seed(1)
    for name, value in network.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    return network.eval()


def assert_same_function(ours: Network, theirs: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    assert not ours.training


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_networks_are_ours(name, tmp_path):
    theirs = randomised(torchvision.models.get_model(name, num_classes=7))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    assert_same_function(load_published(f"torchvision/{name}", str(tmp_path / "weights.pth"), IMAGENET, 7), theirs)


@needs_timm
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timms_networks_are_ours(name, tmp_path):
    import timm
    from safetensors.torch import save_file

    theirs = randomised(timm.create_model(name, pretrained=False, num_classes=7))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = load_published(f"timm/{name}", str(tmp_path / "model.safetensors"), IMAGENET, 7)
    assert_same_function(ours, theirs)


@needs_timm
@pytest.mark.parametrize("name", ["resnet50d", "resnetaa50", "resnext50_32x4d", "wide_resnet50_2", "seresnet50"])
def test_timms_variants_are_refused_by_name_and_their_weights_by_shape(name, tmp_path):
    import timm
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="compute something else"):
        parse_published(f"timm/{name}")
    if name != "resnetaa50":  # has the same parameters: only its name tells
        save_file(timm.create_model(name, num_classes=3).state_dict(), tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=r"as resnet50\)"):
            load_published("timm/resnet50", str(tmp_path / "model.safetensors"), IMAGENET, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/resnext50_32x4d", "is not one of resnet18, resnet34"),
        ("torchvision/resnet20", "is not one of"),
        ("torch/resnet50", "unknown library 'torch'"),
        ("/resnet50", "unknown library ''"),
        ("runs/t/model.pt", "give a file of weights with --teacher-weights"),
        ("torchvision/", "is not one of"),
        ("torchvision/resnet50.IMAGENET1K_V9", "known: IMAGENET1K_V1, IMAGENET1K_V2"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_fetched(name, message):
    with pytest.raises(UserError, match=message):
        settle(Recipe(arch="plain50", teacher=name))


def test_defaults_become_names_of_weights_where_a_recipe_is_settled():
    assert settle(Recipe(teacher="torchvision/resnet50")).teacher == "torchvision/resnet50.IMAGENET1K_V2"
    settled = settle(Recipe(teacher="torchvision/resnet50.IMAGENET1K_V1"))
    assert settled.teacher == "torchvision/resnet50.IMAGENET1K_V1"
    assert settle(settled) == settled
    # Nothing is looked up where a file is given or no teacher is needed.
    assert settle(Recipe(teacher="timm/resnet50", teacher_weights="x.safetensors")).teacher == "timm/resnet50"
    assert settle(Recipe(method="ce", teacher="timm/resnet50")).teacher == "timm/resnet50"


@needs_timm
def test_timms_record_has_mean_std_and_repository():
    record = look_up(parse_published("timm/resnet50.a1_in1k"))
    assert (record.mean, record.std, record.place) == (IMAGENET_MEAN, IMAGENET_STD, "timm/resnet50.a1_in1k")
    assert settled_name("timm/resnet50").startswith("timm/resnet50.")
    with pytest.raises(UserError, match=r"known: .*a1_in1k"):
        look_up(parse_published("timm/resnet50.nothing"))
    # A tag says how its images were normalised, here otherwise than ImageNet's.
    with pytest.raises(UserError, match="normalised otherwise"):
        load_published("timm/resnet34.ra4_e3600_r224_in1k", "anything.safetensors", IMAGENET, 3)


def test_a_library_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(UserError, match=r"pip install '\.\[timm\]'"):
        settled_name("timm/resnet50")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torchvision's default resnet18 is a file of ours, whose name holds its hash; torch's cache is empty."""
    theirs = randomised(torchvision.models.resnet18(num_classes=5))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "weights.pth").rename(tmp_path / f"resnet18-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    record = look_up(parse_published("torchvision/resnet18"))
    record = replace(record, classes=5, place=(tmp_path / f"resnet18-{digest}.pth").as_uri())
    monkeypatch.setattr("rd_train.teachers._torchvision_record", lambda published: record)
    return theirs, tmp_path / f"resnet18-{digest}.pth"


def test_weights_are_fetched_once(hub):
    theirs, file = hub
    assert_same_function(load_published("torchvision/resnet18", None, IMAGENET, 5), theirs)
    file.unlink()
    assert_same_function(load_published("torchvision/resnet18", None, IMAGENET, 5), theirs)


def test_a_run_goes_on_with_what_it_fetched(hub, tmp_path, monkeypatch):
    """Without the library, and without its hub."""
    write_imagenet(tmp_path / "data")
    recipe = Recipe(data="folder", data_dir=str(tmp_path / "data"), size=32, teacher="torchvision/resnet18", workers=0,
                    arch="plain18", epochs=1, batch_size=20, warmup_epochs=0.5, precision="fp32", device="cpu",
                    threads=1)  # fmt: skip
    record = replace(look_up(parse_published("torchvision/resnet18")), classes=2)
    theirs = randomised(torchvision.models.resnet18(num_classes=2))
    monkeypatch.setattr("rd_train.teachers._torchvision_record", lambda published: record)
    monkeypatch.setattr("rd_train.teachers.fetch", lambda published, record: theirs.state_dict())
    recipe = settle(recipe)

    def stop(*arguments, **options):
        raise Stopped("stopped", 130)

    monkeypatch.setattr("rd_train.run.fit", stop)
    with pytest.raises(Stopped):
        run(recipe, tmp_path / "run")
    kept = load_checkpoint(tmp_path / "run" / "teacher.pt")
    assert all(torch.equal(kept.state_dict[name], value) for name, value in theirs.state_dict().items())
    for name in ("_torchvision_record", "fetch"):
        monkeypatch.setattr(f"rd_train.teachers.{name}", lambda *arguments: pytest.fail("was asked"))
    assert settle(recipe, begun=True) == recipe
    with pytest.raises(Stopped):
        run(recipe, tmp_path / "run", resume=True)


def test_weights_of_other_classes_are_not_even_fetched(hub):
    _, file = hub
    file.unlink()
    with pytest.raises(
        UserError, match=r"knows 5 classes, this data set has 3: .*rd-train finetune torchvision/resnet18"
    ):
        load_published("torchvision/resnet18", None, IMAGENET, 3)


def test_a_published_teacher_teaches_in_a_run(tmp_path, capsys):
    write_imagenet(tmp_path / "data")
    theirs = randomised(torchvision.models.resnet18(num_classes=2))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    flags = ["folder-plain18", "--data-dir", str(tmp_path / "data"), "--teacher", "torchvision/resnet18"]
    flags += ["--teacher-weights", str(tmp_path / "weights.pth"), "--size", "32", "--epochs", "1", "--batch-size", "20"]
    flags += ["--warmup-epochs", "0.5", "--workers", "0", "--out", str(tmp_path / "run")]
    assert run_command("rd-train", lambda: command(flags)) == 0
    assert "teacher  resnet18 (torchvision/resnet18 from " in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    images = load_dataset("folder", tmp_path / "data", size=32).test
    with torch.no_grad():
        predicted = theirs(images.images(torch.arange(len(images)))).argmax(1)
    assert result["teacher_test_accuracy"] == pytest.approx(float((predicted == images.labels).float().mean()))


def test_a_failed_or_broken_download_is_one_line_and_is_not_kept(hub, tmp_path):
    _, file = hub
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"cannot fetch .*invalid hash.*--teacher-weights"):
        load_published("torchvision/resnet18", None, IMAGENET, 5)
    file.unlink()
    with pytest.raises(UserError, match="cannot fetch torchvision/resnet18"):
        load_published("torchvision/resnet18", None, IMAGENET, 5)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@needs_timm
def test_timms_hub_gives_safetensors_only(tmp_path, monkeypatch):
    import huggingface_hub
    import timm
    from safetensors.torch import save_file

    theirs = randomised(timm.create_model("resnet18"))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def fetch(*arguments):
        asked.append(arguments)
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert_same_function(load_published("timm/resnet18.a1_in1k", None, IMAGENET, 1000), theirs)
    assert asked == [("timm/resnet18.a1_in1k", "model.safetensors")]

    def fail(*arguments):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=r"cannot fetch timm/resnet18\.a1_in1k \(no network\)"):
        load_published("timm/resnet18.a1_in1k", None, IMAGENET, 1000)


def test_other_normalisation_and_other_files_are_refused(tmp_path):
    other = Preprocessing(32, 32, 3, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    with pytest.raises(UserError, match="normalised otherwise"):
        load_published("torchvision/resnet18", "nowhere.pth", other, 3)
    torch.save({"format": "residual-distillation/1"}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="leave --teacher away"):
        load_published("torchvision/resnet18", str(tmp_path / "model.pt"), IMAGENET, 3)
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"no classifier fc\.weight"):
        load_published("torchvision/resnet18", str(tmp_path / "part.pth"), IMAGENET, 3)


@needs_safetensors
def test_a_damaged_safetensors_file_is_one_line(tmp_path):
    from safetensors.torch import save_file

    arch = parse_arch("resnet20", width=1 / 8, in_channels=1, classes=3)
    weights = Network(arch).state_dict()
    save_file(weights, tmp_path / "good.safetensors")
    grey = Preprocessing(size=8, resize=8, channels=1, mean=(0.3,), std=(0.4,))
    network = load_teacher(tmp_path / "good.safetensors", arch, grey, ["a", "b", "c"])
    assert torch.equal(network.conv1.weight, weights["conv1.weight"])
    whole = (tmp_path / "good.safetensors").read_bytes()
    for content in (whole[:-5], whole[: len(whole) // 2], b"\xff" * 8 + whole, b"text"):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="damaged") as error:
            load_teacher(tmp_path / "bad.safetensors", arch, grey, ["a", "b", "c"])
        assert "\n" not in str(error.value)


def test_a_teacher_deeper_than_the_counterpart_teaches_by_splices_and_logits():
    recipe = Recipe(arch="plain50", teacher="torchvision/resnet101", splice_weight_end=0.1, kd_weight=0.5)
    student = parse_arch("plain50", classes=9)
    assert teacher_arch(recipe, student) == parse_arch("resnet101", classes=9)
    assert isinstance(meta_task(recipe, student), ResidualDistillation)
    torch.manual_seed(0)
    teacher = Network(parse_arch("resnet101", width=1 / 32, classes=9))
    plain = Network(replace(student, width=1 / 32), "dirac")
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    for task in (
        ResidualDistillation(plain, teacher, kd_weight=0.5, teacher_bn="batch"),
        LogitDistillation(plain, teacher, kd_weight=0.5, kd_temperature=4.0),
    ):
        plain.zero_grad()
        task.train()(images, labels, torch.tensor(0.0))["loss"].backward()
        assert plain.layer1[0].conv1.weight.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_published_teacher_is_no_joint_one():
    with pytest.raises(UserError, match="is a trained one"):
        Recipe(method="jointrd", teacher_mode="joint", teacher="torchvision/resnet18")
    assert Recipe(teacher="torchvision/resnet18", teacher_epochs=2).unused() == ["teacher_epochs"]
