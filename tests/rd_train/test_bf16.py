"""bf16 on CPUs without it, against float64 and the hardware's."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rd_deploy.common import UserError
from rd_train import bf16
from rd_train.recipe import Recipe
from rd_train.run import run

HALF_A_PLACE = 2**-8  # of 8 significant bits, at most, relative
RECIPE = Recipe(device="cpu", precision="bf16", threads=1)


def without_bf16(monkeypatch) -> None:
    monkeypatch.setattr(bf16, "torch_multiplies_bf16", lambda: False)


def bf16_leaf(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    return torch.randn(shape).bfloat16().contiguous(memory_format=layout).requires_grad_()


def check_rounded(found: torch.Tensor, exact: torch.Tensor, summands: torch.Tensor) -> None:
    """Right but for one rounding to bf16 and for sums in fp32, whose error grows with the size of what is summed."""
    assert found.dtype == torch.bfloat16
    allowed = HALF_A_PLACE * exact.abs() + 1e-6 * summands
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions_and_their_gradients_are_rounded_once(layout, bias):
    torch.manual_seed(0)
    images, weight = bf16_leaf(4, 24, 9, 9, layout=layout), bf16_leaf(8, 24, 3, 3, layout=layout)
    parts = [images, weight, *([bf16_leaf(8)] if bias else [])]
    above = torch.randn(4, 8, 5, 5).bfloat16()

    def results(parts: list[torch.Tensor], above: torch.Tensor) -> list[torch.Tensor]:
        found = F.conv2d(*parts, stride=2, padding=1)
        return [found.detach(), *torch.autograd.grad(found, parts, above)]

    with bf16.Fp32Products():
        found = results(parts, above)
    exact = results([part.detach().double().requires_grad_() for part in parts], above.double())
    summands = results([part.detach().double().abs().requires_grad_() for part in parts], above.double().abs())
    for each in zip(found, exact, summands, strict=True):
        check_rounded(*each)


def test_a_linear_layer_and_its_gradients_are_rounded_once():
    torch.manual_seed(0)
    parts = [bf16_leaf(16, 300), bf16_leaf(10, 300), bf16_leaf(10)]
    above = torch.randn(16, 10).bfloat16()
    with bf16.Fp32Products():
        found = F.linear(*parts)
        gradients = torch.autograd.grad(found, parts[:2], above)
    rows, weight, bias = (part.detach().double() for part in parts)
    up = above.double()
    exact = [rows @ weight.T + bias, up @ weight, up.T @ rows]
    summands = [rows.abs() @ weight.abs().T + bias.abs(), up.abs() @ weight.abs(), up.abs().T @ rows.abs()]
    for each in zip([found, *gradients], exact, summands, strict=True):
        check_rounded(*each)


def test_fp32_is_left_alone():
    torch.manual_seed(0)
    images, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with bf16.Fp32Products():
        found = F.conv2d(images, weight)
    assert torch.equal(found, F.conv2d(images, weight))


def test_gradients_of_a_network_err_as_those_of_torch_in_bf16():
    """By instructions where this CPU has them."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3, stride=2), nn.Flatten()
    )
    network.append(nn.Linear(16 * 6 * 6, 10))
    images, labels = torch.randn(64, 3, 16, 16), torch.randint(10, (64,))

    def gradients(mode: contextlib.AbstractContextManager, *, autocast: bool = True) -> torch.Tensor:
        with mode:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = network(images)
            loss = F.cross_entropy(logits.float(), labels)
            return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(network.parameters()))])

    exact = gradients(contextlib.nullcontext(), autocast=False)
    ours, theirs = gradients(bf16.Fp32Products()), gradients(contextlib.nullcontext())
    assert float((ours - exact).norm() / exact.norm()) > 0.001  # it is bf16, whose places are 2**-8
    assert float((ours - exact).norm()) < 1.25 * float((theirs - exact).norm())


@pytest.mark.parametrize(
    ("changes", "emulated"), [({}, True), ({"precision": "fp32"}, False), ({"device": "cuda"}, False)]
)
def test_only_bf16_on_the_cpu_is_emulated(monkeypatch, changes, emulated):
    recipe = replace(RECIPE, **changes)
    without_bf16(monkeypatch)
    assert bf16.emulated(recipe) is emulated
    assert isinstance(bf16.products(recipe), bf16.Fp32Products) is emulated
    monkeypatch.setattr(bf16, "torch_multiplies_bf16", lambda: True)
    assert not bf16.emulated(recipe)


def test_what_stands_in_for_bf16_cannot_be_compiled(monkeypatch):
    without_bf16(monkeypatch)
    with pytest.raises(UserError, match="use --precision fp32 or --compile false"):
        bf16.products(replace(RECIPE, compile=True))


def test_a_run_takes_it_and_says_so(monkeypatch, tmp_path, capsys):
    without_bf16(monkeypatch)
    types = set()
    real = bf16.Fp32Products.__torch_dispatch__

    def noted(self, function, *rest):
        if function is torch.ops.aten.convolution_backward.default:
            types.add(rest[1][0].dtype)
        return real(self, function, *rest)

    monkeypatch.setattr(bf16.Fp32Products, "__torch_dispatch__", noted)
    recipe = replace(RECIPE, method="ce", width=0.25, epochs=1, warmup_epochs=0, train_limit=100, batch_size=50)
    result = run(recipe, tmp_path)
    assert types == {torch.bfloat16}
    assert result["emulated_bf16"] is True
    assert "1 threads, emulated bf16" in capsys.readouterr().out
