"""bf16 on CPUs without it: which products are made in fp32, against float64 and torch's own bf16."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rd_deploy.common import UserError
from rd_train import bf16
from rd_train.optimizers import KernelMuon
from rd_train.plan import settle
from rd_train.recipe import Recipe
from rd_train.run import run

HALF_A_PLACE = 2**-8  # of 8 significant bits, at most, relative
RECIPE = Recipe(device="cpu", precision="bf16-emulated", threads=1, method="ce", init="kaiming", width=0.25, epochs=1,
                warmup_epochs=0, train_limit=100, batch_size=50)  # fmt: skip


class Below(TorchDispatchMode):
    """What reaches torch: each product's name and the types of its tensors."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in bf16.PRODUCTS:
            types = {value.dtype for value in args if isinstance(value, torch.Tensor)}
            self.seen.add((function.overloadpacket.__name__, *types))
        return function(*args, **(kwargs or {}))


def in_fp32(*names: str) -> set:
    return {(name, torch.float32) for name in names}


def leaf(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    return torch.randn(shape).bfloat16().contiguous(memory_format=layout).requires_grad_()


def check_rounded(found: torch.Tensor, exact: torch.Tensor, summands: torch.Tensor) -> None:
    """Right but for one rounding to bf16 and for sums in fp32: of hundreds of summands some places of 2**-24 each."""
    assert found.dtype == torch.bfloat16
    allowed = HALF_A_PLACE * exact.abs() + 1e-6 * summands
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions_and_their_gradients_are_rounded_once(layout, bias):
    torch.manual_seed(0)
    images, weight = leaf(4, 24, 9, 9, layout=layout), leaf(8, 24, 3, 3, layout=layout)
    parts = [images, weight, *([leaf(8)] if bias else [])]
    above = torch.randn(4, 8, 5, 5).bfloat16()

    def results(parts: list[torch.Tensor], above: torch.Tensor) -> list[torch.Tensor]:
        found = F.conv2d(*parts, stride=2, padding=1)
        return [found.detach(), *torch.autograd.grad(found, parts, above)]

    with Below() as below, bf16.Fp32Products():
        found = results(parts, above)
    assert below.seen == in_fp32("convolution", "convolution_backward")
    exact = results([part.detach().double().requires_grad_() for part in parts], above.double())
    summands = results([part.detach().double().abs().requires_grad_() for part in parts], above.double().abs())
    for each in zip(found, exact, summands, strict=True):
        check_rounded(*each)


def test_a_linear_layer_and_its_gradients_are_rounded_once():
    torch.manual_seed(0)
    parts = [leaf(16, 300), leaf(10, 300), leaf(10)]
    above = torch.randn(16, 10).bfloat16()
    with Below() as below, bf16.Fp32Products():
        found = F.linear(*parts)
        gradients = torch.autograd.grad(found, parts[:2], above)
    assert below.seen == in_fp32("addmm", "mm")
    rows, weight, bias = (part.detach().double() for part in parts)
    up = above.double()
    exact = [rows @ weight.T + bias, up @ weight, up.T @ rows]
    summands = [rows.abs() @ weight.abs().T + bias.abs(), up.abs() @ weight.abs(), up.abs().T @ rows.abs()]
    for each in zip([found, *gradients], exact, summands, strict=True):
        check_rounded(*each)


def test_a_gradient_that_nobody_wants_is_none():
    images, weight = torch.randn(1, 2, 4, 4).bfloat16(), leaf(2, 2, 3, 3)
    with bf16.Fp32Products():
        F.conv2d(images, weight).sum().backward()
    assert images.grad is None
    assert weight.grad.dtype == torch.bfloat16


def test_other_types_are_left_alone():
    torch.manual_seed(0)
    images, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with bf16.Fp32Products():
        found = F.conv2d(images, weight)
        with pytest.raises(RuntimeError):  # as without it
            torch.mm(torch.randn(2, 2).bfloat16(), torch.randn(2, 2))
    assert torch.equal(found, F.conv2d(images, weight))


@pytest.mark.parametrize(
    ("multiplies", "asked", "settled"),
    [
        (False, "auto", "fp32"),
        (False, "bf16", "bf16-emulated"),
        (False, "fp32", "fp32"),
        (True, "auto", "bf16"),
        (True, "bf16", "bf16"),
        (True, "bf16-emulated", "bf16-emulated"),
    ],
)
def test_what_a_cpu_makes_of_a_precision(monkeypatch, multiplies, asked, settled):
    monkeypatch.setattr(bf16, "cpu_multiplies_bf16", lambda: multiplies)
    found = settle(replace(RECIPE, precision=asked))
    assert found.precision == settled
    assert settle(found) == found  # what a resume asks


def test_what_stands_in_for_bf16_cannot_be_compiled(monkeypatch):
    monkeypatch.setattr(bf16, "cpu_multiplies_bf16", lambda: False)
    with pytest.raises(UserError, match="take compile=false and device=cpu, or another precision"):
        settle(replace(RECIPE, precision="bf16", compile=True))
    with pytest.raises(UserError, match="take compile=false and device=cpu, or another precision"):
        replace(RECIPE, device="cuda")


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16", "bf16"])
def test_instructions_count_where_torch_uses_them(monkeypatch, flag):
    class Ops:
        used = True

        @classmethod
        def _is_mkldnn_bf16_supported(cls) -> bool:
            return cls.used

    monkeypatch.setattr("torch.ops.mkldnn", Ops)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.setattr(bf16, "cpu", lambda: {"flags": [flag]})
    assert bf16.cpu_multiplies_bf16()
    Ops.used = False  # ONEDNN_MAX_CPU_ISA, say
    assert not bf16.cpu_multiplies_bf16()
    Ops.used = True
    monkeypatch.setattr(bf16, "cpu", lambda: {"flags": ["avx512f", "avx512bw"]})
    assert not bf16.cpu_multiplies_bf16()


def test_gpus_that_only_convert_bf16_do_not_multiply_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert settle(replace(RECIPE, precision="auto", device="cuda")).precision == "fp32"


def test_torch_says_whether_it_uses_them():
    assert torch.ops.mkldnn._is_mkldnn_bf16_supported() in (True, False)


def test_every_product_of_a_run_is_in_fp32_and_its_maps_are_bf16(tmp_path, capsys, monkeypatch):
    rounded = set()
    original = bf16.Fp32Products.__torch_dispatch__

    def noted(self, function, *rest):
        found = original(self, function, *rest)
        if function in bf16.PRODUCTS:
            rounded.add((found if isinstance(found, torch.Tensor) else found[1]).dtype)
        return found

    monkeypatch.setattr(bf16.Fp32Products, "__torch_dispatch__", noted)
    with Below() as below:
        result = run(RECIPE, tmp_path)
    assert below.seen == in_fp32("convolution", "convolution_backward", "addmm", "mm")
    assert rounded == {torch.bfloat16}
    assert result["precision"] == "bf16-emulated"
    assert "cpu, 1 threads, bf16-emulated" in capsys.readouterr().out


@pytest.mark.parametrize("multiplies", [False, True])
def test_muon_multiplies_in_bf16_as_the_cpu_can(monkeypatch, multiplies):
    monkeypatch.setattr(bf16, "cpu_multiplies_bf16", lambda: multiplies)
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(16, 8, 3, 3))
    before = kernel.detach().clone()
    optimizer = KernelMuon([kernel], lr=1.0, ns_steps=5)
    kernel.grad = torch.randn(16, 8, 3, 3)
    with Below() as below:
        optimizer.step()
    expected = torch.bfloat16 if multiplies else torch.float32
    assert {kind for _, kind in below.seen} == {expected}
    moved = torch.linalg.svdvals((before - kernel.detach()).view(16, -1).double())
    assert moved.max() / moved.min() < 3  # torch's five iterations leave them between 0.7 and 1.2 of a common size
