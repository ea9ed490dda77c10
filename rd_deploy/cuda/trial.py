"""Whether a kernel computes what it should on this GPU: on random maps, and compared with torch in float32."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rd_deploy.chain import Chain
from rd_deploy.common import first_line
from rd_deploy.cuda.plan import Piece, places
from rd_deploy.cuda.session import pack
from rd_deploy.helper import Fatal
from rd_deploy.triton_kernels.launch import ELEMENT, Kernel, Launch

# Largest error of a kernel / largest value of its reference, in units of the precision's rounding: three products in a
# row round twice in between and once at the end, so a right kernel stays well below, and a wrong one far above.
UNITS = 8
ROUNDING = {"fp16": 2.0**-10, "bf16": 2.0**-7}


def wait() -> None:
    """Until the GPU has done everything; raises what went wrong there."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def context_is_lost() -> bool:
    """Whether a kernel's fault took the GPU's context along: then every later call of this process fails."""
    try:
        wait()
    except RuntimeError:
        return True
    return False


def use(device: str) -> None:
    """From now on, launch on this device, which a new process does not know."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)


@dataclass(frozen=True)
class Choice:
    """A kernel of a chain, how it is configured, and whether its launch may overlap the one before."""

    kernel: Kernel
    config: Any
    pdl: bool = False

    def __str__(self) -> str:
        return f"{self.kernel} {self.config}{' PDL' if self.pdl else ''}"


@dataclass
class Trial:
    """Kernels of a chain on a device, each with random maps and the chain's weights. Can be sent to a process.

    ``launches``: so many must give the same bits, the first of which are compared with torch's values. What goes wrong
    by chance (a race, registers that are written too early) can pass once.
    """

    chain: Chain
    batch: int
    precision: str
    device: str
    launches: int = 1
    _pieces: dict[Kernel, Piece] = field(default_factory=dict)
    _inputs: tuple[Kernel, dict, Any] | None = None  # of the kernel at work, and what it should make of them

    def __getstate__(self) -> dict:
        """Without what lies on a device."""
        return vars(self) | {"_pieces": {}, "_inputs": None}

    def __call__(self, choice: Choice) -> str | None:
        """Why a choice must not be used; None: it is right. A broken context is `Fatal`."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        launch, doing = choice.kernel.launch(choice.config, choice.pdl), "its reference"
        try:
            use(self.device)
            operands = self.operands(choice, launch)
            wait()  # a fault of the reference, or of a copy, must not pass for the kernel's
            doing = "it"
            return self._wrong(launch, operands, 2 if choice.pdl else 1)  # launches in a row overlap
        except (OutOfResources, CompilationError, PTXASError, RuntimeError) as error:  # the last: memory, the driver
            reason = first_line(error)
            if context_is_lost():
                raise Fatal(f"{doing} broke the GPU's context: {reason}") from error
            return reason if doing == "it" else f"{doing} failed: {reason}"

    def _wrong(self, launch: Launch, operands: dict[str, Any], in_a_row: int) -> str | None:
        """What is wrong with what a kernel makes, if anything is, by values and then by bits."""
        out, first = operands["out"], None
        for number in range(1, self.launches + 1):
            out.fill_(float("nan"))
            for _ in range(in_a_row):
                launch.run(operands)
            if first is None:
                off, first = self._error(out), out.clone()  # which wait for the kernel
                if not off <= UNITS * ROUNDING[self.precision]:  # NaN, too
                    return f"wrong by {off:.2g} of the largest value"
            elif not bool((out == first).all()):
                return f"launch {number} gives other bits than the first"
        return None

    def operands(self, choice: Choice, launch: Launch) -> dict[str, Any]:
        """Memory for a launch: maps, weights, scratch, and an output of what is not a number."""
        import torch

        types = self._types()
        inputs, expected = self._reference(choice.kernel, launch)
        out = torch.full_like(expected, float("nan"), dtype=types[launch.tensors["out"]])
        scratch = {
            name: torch.zeros(count, dtype=types[kind], device=self.device)
            for name, (kind, count) in choice.kernel.scratch(choice.config).items()
        }
        return inputs | scratch | {"out": out}

    @property
    def weights(self) -> list[str]:
        """Which of the operands that were made last are weights."""
        _, inputs, _ = self._inputs
        return [name for name in inputs if name not in ("x", "add")]

    def forget(self) -> None:
        """Give the last kernel's memory back."""
        self._inputs = None

    def _piece(self, kernel: Kernel) -> Piece:
        if not self._pieces:
            ways = [way for ways in places(self.chain, self.batch) for way in ways]
            pieces = [piece for way in reversed(ways) for piece in way]  # of equal kernels the first one's weights
            self._pieces.update((piece.kernel, piece) for piece in pieces)
        return self._pieces[kernel]

    def _types(self) -> dict[str, Any]:
        import torch

        element = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return {ELEMENT: element, "fp32": torch.float32, "i32": torch.int32}

    def _reference(self, kernel: Kernel, launch: Launch) -> tuple[dict[str, Any], Any]:
        """Random inputs and real weights of a kernel, and what it should make of them, in float32."""
        import torch

        if self._inputs is None or self._inputs[0] != kernel:
            self.forget()
            piece, shapes, types = self._piece(kernel), self.chain.shapes(), self._types()
            sources = {"x": piece.steps[0].source}
            if "add" in launch.tensors:
                sources["add"] = piece.steps[-1].add
            inputs = {name: self._random(shapes[tensor]) for name, tensor in sources.items()}
            for name, values in pack(piece, self.precision, launch).items():
                inputs[name] = torch.from_numpy(np.array(values)).to(self.device, types[launch.tensors[name]])
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                expected = kernel.reference(**{name: tensor.float() for name, tensor in inputs.items()})
            self._inputs = kernel, inputs, expected.contiguous()
        return self._inputs[1:]

    def _random(self, shape: tuple[int, ...]):
        """A map (N, H, W, C) such as ReLU leaves it: half zeros; small enough for sums within fp16."""
        import torch

        channels, height, width = [*shape, 1, 1][:3]
        generator = torch.Generator(self.device).manual_seed(0)
        size = (self.batch, height, width, channels)
        return torch.randn(size, generator=generator, device=self.device).relu_().to(self._types()[ELEMENT])

    def _error(self, out) -> float:
        """Of the largest value; a reference of zeros alone wants zeros."""
        expected = self._inputs[2]
        largest = float(expected.abs().max())
        return float((out.float() - expected).abs().max()) / (largest or 1.0)
