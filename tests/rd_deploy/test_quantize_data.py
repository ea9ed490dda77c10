"""Where images come from: three sets that have nothing in common, labelled where somebody knows the labels."""

import types

import numpy as np
import pytest
from chains import basics

from rd_deploy.common import UserError
from rd_deploy.preprocessing import Preprocessing
from rd_deploy.quantize import CalibrationError, Samples, calibrate, quantization_data

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torch")
data = pytest.importorskip("rd_train.data")


def contents(samples: Samples) -> set[bytes]:
    return {image.tobytes() for image in samples.load(np.arange(samples.count))}


def apart(*sets: set[bytes]) -> bool:
    return len(set.union(*sets)) == sum(map(len, sets))


def write_images(folder, names: list[str], seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (14, 12), dtype=np.uint8)).save(folder / name)


@pytest.fixture(scope="module")
def checkpoint():
    pytest.importorskip("sklearn")
    dataset = data.load_dataset("digits")
    return types.SimpleNamespace(
        recipe={"data": "digits"}, preprocessing=dataset.preprocessing, classes=dataset.classes
    )


def test_a_checkpoints_splits_calibrate_choose_and_judge(checkpoint):
    given, dataset = quantization_data(basics(), checkpoint), data.load_dataset("digits")
    assert [s.count for s in (given.calibration, given.choosing, given.gate)] == [
        512,
        len(dataset.val),
        len(dataset.test),
    ]
    assert [s.origin.split()[0] for s in (given.calibration, given.choosing, given.gate)] == [
        "training",
        "validation",
        "test",
    ]
    np.testing.assert_array_equal(given.gate.labels, dataset.test.labels.numpy())
    some = np.array([3, 1, 200])
    np.testing.assert_array_equal(given.gate.load(some), dataset.test.images(data.torch.from_numpy(some)).numpy())
    assert apart(contents(given.calibration), contents(given.gate))
    # evenly spread over the split, with the labels of these images
    chosen = np.linspace(0, len(dataset.train) - 1, 512).round().astype(int)
    np.testing.assert_array_equal(given.calibration.labels, dataset.train.labels.numpy()[chosen])
    assert quantization_data(basics(), checkpoint, calibration_images=10).calibration.count == 10


def test_other_data_than_the_trainings_is_refused(checkpoint):
    other = Preprocessing(8, 8, 1, (0.5,), (0.5,))
    with pytest.raises(UserError, match="not the data that the checkpoint was trained on"):
        quantization_data(basics(), types.SimpleNamespace(recipe=checkpoint.recipe, preprocessing=other))
    values = vars(checkpoint) | {"classes": checkpoint.classes[::-1]}
    with pytest.raises(UserError, match="the classes of digits here are not those that the checkpoint was trained on"):
        quantization_data(basics(), types.SimpleNamespace(**values))
    for recipe in (None, {}, {"data": 3}, {"data": "digits", "size": "8"}):
        with pytest.raises(UserError, match="does not say which data"):
            quantization_data(basics(), types.SimpleNamespace(recipe=recipe, preprocessing=other))
    with pytest.raises(UserError, match="no images to quantise with"):
        quantization_data(basics(), types.SimpleNamespace(recipe={"data": "idx"}, preprocessing=other), "/nonexistent")


@pytest.mark.parametrize("count", [8, 9, 40])
def test_a_folder_is_divided_into_three_parts(tmp_path, count):
    write_images(tmp_path, [f"{index:03}.png" for index in range(count)])
    given = quantization_data(basics(), images=tmp_path)
    parts = (given.calibration, given.choosing, given.gate)
    assert sum(part.count for part in parts) == count
    assert given.calibration.count == count // 4
    assert abs(given.choosing.count - given.gate.count) <= 1
    assert apart(*map(contents, parts))
    assert {part.labels for part in parts} == {None}


def test_folders_named_as_classes_give_labels(tmp_path):
    chain = basics(classes=3)
    write_images(tmp_path, [f"class {label}/{index}.png" for label in (0, 2) for index in range(10)])
    given = quantization_data(chain, images=tmp_path)
    labels = np.concatenate([part.labels for part in (given.calibration, given.choosing, given.gate)])
    assert sorted(labels) == [0] * 10 + [2] * 10
    assert set(given.gate.labels) == {0, 2}
    write_images(tmp_path, ["other/x.png"], seed=1)
    assert quantization_data(chain, images=tmp_path).gate.labels is None


def test_random_weights_get_random_images_and_no_gate():
    chain = basics()
    given, same = quantization_data(chain), quantization_data(chain)
    assert (given.calibration.count, given.choosing.count, given.gate) == (64, 64, None)
    assert (
        contents(given.calibration)
        == contents(same.calibration)
        != contents(quantization_data(chain, seed=1).calibration)
    )
    assert apart(contents(given.calibration), contents(given.choosing))
    assert given.calibration.labels is None


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="--calibration-images must be at least 1"):
        quantization_data(basics(), calibration_images=0)
    write_images(tmp_path, [f"{index}.png" for index in range(7)])
    with pytest.raises(UserError, match="holds 7 image files; quantising needs at least 8"):
        quantization_data(basics(), images=tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        quantization_data(basics(), images=tmp_path / "nothing")


def test_batches_are_whole_but_for_the_last():
    values = np.arange(7 * 4, dtype=np.float32).reshape(7, 1, 2, 2)
    samples = Samples(values.__getitem__, 7, np.arange(7), "made up")
    assert [len(batch) for batch in samples.batches(3)] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(list(samples.batches(3))), values)
    picked = samples.select(np.array([5, 2, 0])).select(np.array([2, 0]))
    np.testing.assert_array_equal(picked.labels, [0, 5])
    np.testing.assert_array_equal(picked.load(np.arange(2)), values[[0, 5]])
    assert samples.some(100) is samples
    np.testing.assert_array_equal(samples.some(3).labels, [0, 3, 6])


def test_what_could_not_be_read_is_known_after_it_was_asked_for():
    corrupt = []

    def load(indices: np.ndarray) -> np.ndarray:
        corrupt.extend({2, 5} & {*indices.tolist()})
        return np.zeros((len(indices), 1, 2, 2), np.float32)

    samples = Samples(load, 7, np.arange(7), "made up", lambda: corrupt)
    picked = samples.select(np.array([5, 3, 2, 0])).select(np.array([0, 1, 3]))
    assert [*picked.corrupt()] == []
    picked.load(np.arange(3))
    assert [*picked.corrupt()] == [0]
    assert [*samples.corrupt()] == [5]


def test_a_damaged_image_is_named(tmp_path):
    write_images(tmp_path, [f"{index}.png" for index in range(8)])
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    given = quantization_data(basics(), images=tmp_path)
    with pytest.raises(UserError, match=r"\.png is in none of the formats") as failure:
        calibrate(basics(), "int8", "minmax", given.calibration.batches(4))
    assert not isinstance(failure.value, CalibrationError)
