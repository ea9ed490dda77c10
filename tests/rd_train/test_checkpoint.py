"""The model.pt format: what comes back, and what is refused."""

import contextlib
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from rd_deploy.common import UserError
from rd_deploy.preprocessing import Preprocessing
from rd_train.checkpoint import (
    FORMAT,
    Checkpoint,
    load_checkpoint,
    load_plain,
    load_strictly,
    plain_size,
    save_checkpoint,
    save_plain,
)
from rd_train.networks import Network, parse_arch

PREPROCESSING = Preprocessing(size=8, resize=8, channels=1, mean=(0.3,), std=(0.4,))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network(parse_arch("plain20", width=1 / 8, in_channels=1, classes=3), init="dirac")


@pytest.fixture
def path(tmp_path, network):
    path = tmp_path / "model.pt"
    save_checkpoint(path, Checkpoint(network.arch, network.state_dict(), PREPROCESSING, ["a", "b", "c"], {"lr": 0.1}))
    return path


def test_round_trip(path, network):
    checkpoint = load_checkpoint(path)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(checkpoint.network()(images), network.eval()(images))
    assert not checkpoint.network().training
    assert checkpoint.preprocessing == PREPROCESSING
    assert (checkpoint.classes, checkpoint.recipe) == (["a", "b", "c"], {"lr": 0.1})
    assert checkpoint.provenance["torch"] == str(torch.__version__)


def test_the_size_of_a_file_is_known_before_it_is_written(path):
    values = torch.load(path, weights_only=True)
    save_plain(path, values)
    assert plain_size(values) == path.stat().st_size


def test_it_holds_tensors_and_plain_containers_only(path):
    assert torch.load(path, weights_only=True)["format"] == FORMAT


def rewrite(path, change):
    values = torch.load(path, weights_only=True)
    change(values)
    torch.save(values, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["state_dict"].pop("fc.weight"), "lacks fc.weight"),
        (lambda v: v["state_dict"].update(extra=torch.zeros(1)), "has extra extra"),
        (lambda v: v["state_dict"].update({"fc.bias": torch.zeros(4)}), r"fc.bias has shape \(4,\).* needs \(3,\)"),
        (lambda v: v["state_dict"]["fc.bias"].fill_(float("nan")), "fc.bias holds NaN"),
        (lambda v: v["state_dict"].update({"fc.bias": "text"}), "fc.bias has shape"),
        (lambda v: v["state_dict"].update({"fc.bias": torch.zeros(3, dtype=torch.int32)}), "fc.bias is torch.int32"),
        (lambda v: v["state_dict"].update({"fc.bias": torch.zeros(3, dtype=torch.complex64)}), "fc.bias is"),
        (lambda v: v["state_dict"].update({"fc.bias": torch.zeros(3).to_sparse()}), "sparse"),
        (lambda v: v["state_dict"].update({"fc.bias": torch.zeros(3).to(torch.float8_e4m3fn)}), "fc.bias is"),
        (lambda v: v["state_dict"].update({"fc.bias": torch.zeros(3, device="meta")}), "on meta; the architecture"),
        (lambda v: v["state_dict"]["bn1.running_var"].fill_(-1.0), "bn1.running_var holds a negative variance"),
        (lambda v: v["state_dict"].update({"fc.bias": torch.zeros(1).expand(3)}), "fc.bias repeats its values"),
        (lambda v: v["arch"].update(depth=21), "depth 21 is unknown"),
        (lambda v: v["arch"].update(depth=[20]), "depth"),
        (lambda v: v["arch"].update(width=1e9), "width must be"),
        (lambda v: v["arch"].update(width="1"), "width must be"),
        (lambda v: v["arch"].update(width=16.0), "shape"),
        (lambda v: v["arch"].pop("stem"), "exactly"),
        (lambda v: v.update(format="other/1"), "not a residual-distillation/1"),
        (lambda v: v.pop("classes"), "lacks classes"),
        (lambda v: v.update(classes=["a"]), "must name its 3 classes"),
        (lambda v: v.update(state_dict=[1]), "no state_dict"),
        (lambda v: v.update(preprocessing={}), "preprocessing must have"),
        (lambda v: v["preprocessing"].update(std=[0.0]), "preprocessing"),
        (lambda v: v["preprocessing"].update(channels=3), "preprocessing"),
    ],
)
def test_changed_files_are_refused_with_a_reason(path, change, message):
    rewrite(path, change)
    with pytest.raises(UserError, match=message):
        load_checkpoint(path)


def test_a_file_that_is_larger_than_itself_is_refused(tmp_path, path):
    """A compressed zip, which torch would unpack, can be a thousand times as large in memory."""
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    with pytest.raises(UserError, match="its members are compressed"):
        load_plain(tmp_path / "x.pt", "checkpoint")


def test_another_pickle_protocol_is_refused_without_a_warning_of_torch(tmp_path, recwarn):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt", pickle_protocol=4)
    with pytest.raises(UserError, match="other than tensors"):
        load_plain(tmp_path / "other.pt", "checkpoint")
    assert not recwarn.list


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    mark = tmp_path / "went-off"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (mark,)

    torch.save({"format": FORMAT, "arch": Bomb()}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "net.onnx").write_bytes(b"onnx")
    for name, message in (
        ("zip.pt", "was not loaded"),
        ("bare.pt", "not a torch file"),
        ("net.onnx", "is an exported network, which cannot be read back; give its model.pt"),
    ):
        with pytest.raises(UserError, match=message):
            load_checkpoint(tmp_path / name)
    assert not mark.exists()


def test_missing_empty_truncated_and_foreign_files(tmp_path, path):
    whole = path.read_bytes()
    cases = {
        "empty.pt": b"",
        "text.pt": b"hello",
        "half.pt": whole[: len(whole) // 2],
        "zip.pt": b"PK\x05\x06" + bytes(18),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in (*cases, "missing.pt", "."):
        with pytest.raises(UserError) as error:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(12))
def test_bit_flips_never_crash(tmp_path, path, seed):
    content = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for position in torch.randint(0, len(content), (5,), generator=generator).tolist():
        content[position] ^= 1 << (position % 8)
    (tmp_path / "flipped.pt").write_bytes(content)
    with contextlib.suppress(UserError):  # flips inside a weight may go unseen; anything else must be a UserError
        load_checkpoint(tmp_path / "flipped.pt")


def test_load_strictly_names_what_does_not_fit(network):
    state = network.state_dict()
    state["layer9.weight"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"teacher has extra layer9\.weight"):
        load_strictly(network, state, "teacher")


def test_a_failed_write_leaves_the_old_file(path, network, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match=r"No space left"):
        save_checkpoint(path, Checkpoint(network.arch, network.state_dict(), PREPROCESSING, ["a", "b", "c"]))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["model.pt"]
