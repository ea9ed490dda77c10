"""What engines on an NVIDIA GPU share: a session whose images, maps and logits stay in the GPU's memory."""

from collections.abc import Callable

import numpy as np
import onnx

from rd_deploy.common import UserError, require
from rd_deploy.engines.base import Engine, Session

WARM_UP_RUNS = 3  # before a graph is recorded: libraries choose kernels and allocate in their first runs


class DeviceEngine(Engine):
    """An engine on the current CUDA device, through torch for memory, streams and graphs."""

    device = "cuda"
    precisions = ("fp16", "bf16")
    package = "torch"
    extra = "train"

    def missing(self) -> str | None:
        return super().missing() or no_gpu()


def no_gpu() -> str | None:
    """One line when torch is missing or finds no usable NVIDIA GPU; asked before anything else touches a driver."""
    try:
        torch = require("torch", "train")
    except UserError as reason:
        return str(reason)
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install a build with it"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU with a working driver is visible here (nvidia-smi lists those that are)"
    return None


def current_gpu() -> dict:
    """Name, compute capability (90 for sm_90), multiprocessors and memory of torch's current GPU."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": 10 * properties.major + properties.minor,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


class DeviceSession(Session):
    """One network on one GPU. ``run`` is host to host; `enqueue` runs on what already lies in the GPU's memory.

    ``images``: torch tensor (N, C, H, W), channels-last, in the session's precision: what `enqueue` reads.
    ``logits``: torch tensor (N, classes), what `enqueue` writes; both are the same memory for the session's life.
    Subclasses set ``logits`` by calling `_capture` once, at the end of their constructor.
    """

    def __init__(self, engine: Engine, model: onnx.ModelProto, precision: str, threads: int, batch: int):
        super().__init__(engine, model, precision, threads, batch)
        self._torch = torch = require("torch", "train")
        self.device = self._find_device()
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        channels_last = {"memory_format": torch.channels_last}
        self.images = torch.zeros(self.shape, dtype=self.dtype, device=self.device).contiguous(**channels_last)
        self.logits = None
        self._replay: Callable[[], None] | None = None

    def _find_device(self):
        reason = no_gpu()
        if reason:
            raise UserError(reason)
        return self._torch.device("cuda", self._torch.cuda.current_device())

    def enqueue(self) -> None:
        """One run on torch's current stream: reads ``images``, writes ``logits``; returns before it has finished."""
        self._replay()

    def _capture(self, forward: Callable[[], object], own_graph: bool = False) -> None:
        """Record ``forward``, which reads ``images`` and returns the logits, as one CUDA graph.

        ``own_graph``: the library behind ``forward`` replays a graph of its own and writes to the same tensor each
        time, so it is called as it is.
        """
        torch = self._torch
        with torch.inference_mode():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_RUNS):
                    self.logits = forward()
            torch.cuda.current_stream().wait_stream(side)
            if own_graph:
                self._replay = forward
                return
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = forward()
        self._replay = graph.replay

    def _run(self, images: np.ndarray) -> np.ndarray:
        """Copies to the GPU, casts and reorders there, runs, and copies the logits back."""
        torch = self._torch
        with torch.inference_mode():
            self.images.copy_(torch.from_numpy(images).to(self.device))
            self.enqueue()
            return self.logits.float().cpu().numpy()
