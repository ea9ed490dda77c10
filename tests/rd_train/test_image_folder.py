"""Image folders: their layouts, their decoding, and files that are not what they seem."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from rd_deploy.common import UserError
from rd_train.augment import Augment
from rd_train.data import load_dataset

RNG = np.random.default_rng(0)


def write_images(folder, count, suffix="png", size=(40, 30)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.{suffix}")


def contents(split):
    return {file: split.listing.root / file for file in split.listing.files}


@pytest.fixture
def flat(tmp_path):
    """CLASS/* with formats mixed, and things that are not images."""
    write_images(tmp_path / "cat", 40)
    write_images(tmp_path / "dog", 30, "jpg")
    write_images(tmp_path / "emu", 30, "webp")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_flat_layout_is_divided_once_and_for_all(flat):
    first, second = load_dataset("folder", flat, size=16), load_dataset("folder", flat, size=16)
    parts = [set(contents(split)) for split in (first.train, first.val, first.test)]
    assert first.classes == ["cat", "dog", "emu"]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 100
    assert len(parts[0]) > 60
    assert parts == [set(contents(split)) for split in (second.train, second.val, second.test)]
    for file, label in zip(first.val.listing.files, first.val.labels.tolist(), strict=True):
        assert file.startswith(first.classes[label] + "/")


def test_adding_a_file_moves_no_other(flat):
    before = set(contents(load_dataset("folder", flat).test))
    write_images(flat / "dog", 35, "png")
    after = set(contents(load_dataset("folder", flat).test))
    assert before <= after


def test_train_and_val_layout(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / "train" / name, 50)
        write_images(tmp_path / "val" / name, 5)
    dataset = load_dataset("folder", tmp_path)
    assert {path.parts[-3] for path in contents(dataset.test).values()} == {"val"}
    assert {path.parts[-3] for path in contents(dataset.val).values()} == {"train"}
    assert not set(contents(dataset.train)) & set(contents(dataset.val))
    assert len(dataset.train) + len(dataset.val) == 100
    assert len(dataset.test) == 10


def test_three_part_layout(tmp_path):
    for part, count in (("train", 6), ("val", 3), ("test", 2)):
        for name in ("cat", "dog"):
            write_images(tmp_path / part / name, count)
    dataset = load_dataset("folder", tmp_path)
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [12, 6, 4]
    assert dataset.test.listing.root.name == "test"


def test_evaluation_agrees_with_torchvision_and_with_numpy(flat):
    dataset = load_dataset("folder", flat, size=21)
    images = dataset.val.images(torch.arange(len(dataset.val)))
    record = dataset.preprocessing
    theirs = transforms.Compose(
        [
            transforms.Resize(record.resize),
            transforms.CenterCrop(21),
            transforms.ToTensor(),
            transforms.Normalize(record.mean, record.std),
        ]
    )
    for image, path in zip(images, contents(dataset.val).values(), strict=True):
        original = Image.open(path).convert("RGB")
        assert (image - theirs(original)).abs().max() < 1e-5
        deployed = torch.from_numpy(record.apply(np.asarray(original)))[0]
        assert (image - deployed).abs().max() <= 1.01 / 255 / min(record.std)


def test_default_size_is_imagenets(flat):
    record = load_dataset("folder", flat).preprocessing
    assert (record.size, record.resize, record.pad) == (224, 256, 0)


def test_augmentation_depends_on_index_and_seed_only(flat):
    split = load_dataset("folder", flat, size=16).train
    together = split.augmented(torch.tensor([0, 1, 2]), seed=5)
    assert torch.equal(together, split.augmented(torch.tensor([0, 1, 2]), seed=5))
    assert torch.equal(together[2], split.augmented(torch.tensor([2]), seed=5)[0])
    assert torch.equal(together[1:], split.augmented(torch.tensor([0, 1, 2]), 5, slice(1, 3)))
    assert not torch.equal(together, split.augmented(torch.tensor([0, 1, 2]), seed=6))
    assert together.shape == (3, 3, 16, 16)


def test_without_augmentation_training_images_are_evaluations(flat):
    split = load_dataset("folder", flat, size=16, augment=Augment()).train
    indices = torch.arange(5)
    assert torch.equal(split.augmented(indices, seed=1), split.images(indices))


def test_limit_keeps_the_proportions(flat):
    labels = load_dataset("folder", flat, limit=20).train.labels
    assert len(labels) == 20
    assert (torch.bincount(labels) - torch.tensor([8, 6, 6])).abs().max() <= 2


def test_what_is_left_out_of_class_folders_is_said_once(tmp_path):
    write_images(tmp_path / "train" / "a", 40, "jpg")
    write_images(tmp_path / "train" / "b", 40, "JPEG")
    write_images(tmp_path / "val" / "a", 1)
    write_images(tmp_path / "val" / "b", 1)
    assert load_dataset("folder", tmp_path, size=16).notes == []
    for name in ("b/scan.tiff", "a/more/0.jpg", "a/.hidden/0.jpg", "a/.DS_Store"):
        path = tmp_path / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "train" / "b" / "scan.tiff").rename(tmp_path / "train" / "b" / os.fsdecode(b"caf\xe9\x1b[2J.txt"))
    (note,) = load_dataset("folder", tmp_path, size=16).notes
    assert note.startswith(
        f"{tmp_path / 'train'}: 2 entries of class folders are left out, as a/more: images are files"
    )
    (tmp_path / "train" / "a" / "more" / "0.jpg").unlink()
    (tmp_path / "train" / "a" / "more").rmdir()
    (note,) = load_dataset("folder", tmp_path, size=16).notes
    assert r"as b/caf\udce9\x1b[2J.txt: images" in note  # nothing for a terminal to obey, or to fail on


def test_a_split_that_lacks_a_class_says_so(tmp_path):
    for part, classes in (("train", "abcde"), ("val", "abcde"), ("test", "a")):
        for name in classes:
            write_images(tmp_path / part / name, 2)
    assert load_dataset("folder", tmp_path).notes == ["the test split has no images of b, c, d and 1 more"]


def test_wrong_layouts_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds neither images nor folders: one folder per class is needed"):
        load_dataset("folder", tmp_path)
    write_images(tmp_path / "flat", 3)
    with pytest.raises(UserError, match="holds images without class folders: one folder per class is needed"):
        load_dataset("folder", tmp_path / "flat")
    shutil.rmtree(tmp_path / "flat")
    for part in ("Train", "Test"):
        write_images(tmp_path / "upper" / part / "cat", 3)
    with pytest.raises(
        UserError, match=r"folders of .*upper \(Test, Train\) hold folders, no images; .* train, val and"
    ):
        load_dataset("folder", tmp_path / "upper")
    shutil.rmtree(tmp_path / "upper")
    write_images(tmp_path / "one", 30)
    with pytest.raises(UserError, match="fewer than 2 classes"):
        load_dataset("folder", tmp_path)
    (tmp_path / "two").mkdir()
    with pytest.raises(UserError, match="no images of class 'two'"):
        load_dataset("folder", tmp_path)


def test_wrong_parts_are_refused(tmp_path):
    write_images(tmp_path / "train" / "cat", 3)
    write_images(tmp_path / "train" / "dog", 3)
    with pytest.raises(UserError, match="neither 'val' nor 'test'"):
        load_dataset("folder", tmp_path)
    write_images(tmp_path / "val" / "cow", 1)
    with pytest.raises(UserError, match="class folder 'cow'"):
        load_dataset("folder", tmp_path)


def test_folder_must_be_given_and_exist(tmp_path):
    with pytest.raises(UserError, match="--data-dir"):
        load_dataset("folder")
    with pytest.raises(UserError, match="does not exist"):
        load_dataset("folder", tmp_path / "nowhere")
