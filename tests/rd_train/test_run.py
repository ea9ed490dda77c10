"""What a run makes of its recipe before it trains, and the teacher that it keeps."""

from dataclasses import replace

import pytest
import torch
from test_loop import assert_same, stop_at

from rd_deploy.common import Stopped, UserError
from rd_train.checkpoint import load_checkpoint, save_checkpoint
from rd_train.data import fixed_sample, load_dataset
from rd_train.plan import settle
from rd_train.recipe import Recipe
from rd_train.run import dry_run, run

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


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_run_had_begun_to_write_is_removed(tmp_path, resume):
    if resume:
        run(STILL, tmp_path)
        (tmp_path / "result.json").unlink()
    left = [".student-state.pt.a1_b2c3d.pt", ".result.json.x_x_x_x_.json", ".skipped.txt.12345678.txt"]
    others = [".recipe.yaml.swp", ".model.pt.backup", "student-state.pt.a1_b2c3d.pt", ".mine.a1_b2c3d.pt"]
    for name in (*left, *others):
        (tmp_path / name).write_text("x")
    run(STILL, tmp_path, resume=resume)
    there = {path.name for path in tmp_path.iterdir()}
    assert not there & {*left}
    assert there >= {*others, "result.json"}


# --- a teacher that is given

TAUGHT = replace(STILL, method="rd", epochs=2, lr=0.05, muon_lr=0.01, init_noise=0.1, batch_size=50)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    run(replace(STILL, arch="resnet20", lr=0.05), folder)
    return folder / "model.pt"


def test_a_run_keeps_its_teacher_and_goes_on_with_it(teacher, tmp_path, monkeypatch):
    """Whatever became of the file that it was given."""
    given = tmp_path / "given.pt"
    given.write_bytes(teacher.read_bytes())
    recipe = settle(replace(TAUGHT, teacher_weights=str(given)))
    result = run(recipe, tmp_path / "whole")
    stop_at(monkeypatch, 5)
    with pytest.raises(Stopped):
        run(recipe, tmp_path / "run")
    monkeypatch.undo()
    kept, wanted = (load_checkpoint(path) for path in (tmp_path / "run" / "teacher.pt", teacher))
    assert (kept.arch, kept.classes) == (wanted.arch, wanted.classes)
    assert all(torch.equal(kept.state_dict[name], value) for name, value in wanted.state_dict.items())
    state = torch.load(tmp_path / "run" / "student-state.pt", weights_only=True)
    assert not [name for name in state["task"] if name.startswith("teacher")]
    for value in wanted.state_dict.values():  # another network of the same shape
        value.add_(1)
    save_checkpoint(given, wanted)
    assert settle(recipe, begun=True) == recipe
    again = run(recipe, tmp_path / "run", resume=True)
    assert again["teacher_test_accuracy"] == result["teacher_test_accuracy"]
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_run_that_was_killed_before_it_kept_its_teacher_takes_it_from_the_file(teacher, tmp_path, monkeypatch):
    given = tmp_path / "given.pt"
    given.write_bytes(teacher.read_bytes())
    recipe = settle(replace(TAUGHT, teacher_weights=str(given)))
    stop_at(monkeypatch, 5)
    with pytest.raises(Stopped):
        run(recipe, tmp_path / "run")
    monkeypatch.undo()
    (tmp_path / "run" / "teacher.pt").unlink()
    given.rename(tmp_path / "moved.pt")
    with pytest.raises(UserError, match=r"given.pt does not exist"):
        run(recipe, tmp_path / "run", resume=True)
    (tmp_path / "moved.pt").rename(given)
    run(recipe, tmp_path / "run", resume=True)
    run(recipe, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert (tmp_path / "run" / "teacher.pt").exists()


def test_a_teacher_that_is_kept_is_counted_before(teacher, tmp_path):
    recipe = settle(replace(TAUGHT, teacher_weights=str(teacher)))
    [phase] = dry_run(recipe, tmp_path / "none")
    run(recipe, tmp_path / "run")
    files = [tmp_path / "run" / name for name in ("student-state.pt", "model.pt", "teacher.pt")]
    assert phase.disk == pytest.approx(sum(file.stat().st_size for file in files), rel=0.01)
