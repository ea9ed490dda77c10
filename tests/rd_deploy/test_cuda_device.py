"""A GPU as a card: limits from the driver, rates from the most similar known one."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from rd_deploy.cuda.device import current_card, similar
from rd_deploy.engines import Unsupported
from rd_deploy.triton_kernels.cards import CARDS, get_card


def properties(**changes) -> SimpleNamespace:
    values = {
        **{"name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "multi_processor_count": 114},
        **{"L2_cache_size": 50 << 20, "shared_memory_per_block_optin": 232448},
        **{"shared_memory_per_multiprocessor": 233472, "max_threads_per_multi_processor": 2048},
    }
    return SimpleNamespace(**values | changes)


def use(monkeypatch, **changes) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties(**changes))


def test_limits_are_the_drivers_and_rates_the_cards(monkeypatch):
    use(monkeypatch)
    card = current_card()
    assert (card.name, card.multiprocessors, card.capability) == ("h100", 114, 90)
    assert (card.shared_bytes, card.max_warps) == (232448, 64)
    assert card.dram_gb_s == CARDS["h100"].dram_gb_s


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
    ],
)
def test_names(name, known):
    assert similar(name, CARDS[known].capability, 1) is CARDS[known]


def test_an_unknown_card_is_scaled():
    card = similar("NVIDIA RTX A6000", 86, 84)
    assert "as a100" in card.name
    assert similar("NVIDIA L40S", 89, 142).name == "NVIDIA L40S (as rtx4090)"
    assert card.tflops == pytest.approx(312 * 84 / 108)


def test_too_old_a_card(monkeypatch):
    use(monkeypatch, major=7, minor=5, name="Tesla T4")
    with pytest.raises(Unsupported, match="Tesla T4 is sm_75"):
        current_card()


def test_an_unknown_name_of_a_card():
    from rd_deploy.common import UserError

    with pytest.raises(UserError, match=r"unknown card 'h1000'.*h100"):
        get_card("h1000")
