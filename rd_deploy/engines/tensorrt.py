"""TensorRT and TensorRT-RTX, as `rd_deploy.trt` builds their engines, timed like the others. No GPU has run it yet.

An engine is built when a network is loaded, for one batch size, strongly typed: its precision is that of the ONNX file.
It reads and writes torch's memory on torch's streams, recorded as one CUDA graph. (`rd_deploy.trt.session` takes images
as the host has them, float32; here, as in every engine on a GPU, they lie there in the session's precision.)
"""

import onnx

from rd_deploy.chain import INPUT
from rd_deploy.common import UserError
from rd_deploy.engines.base import Engine, Figure, Session, Unsupported
from rd_deploy.engines.device import DeviceEngine, DeviceSession, no_gpu
from rd_deploy.engines.half_onnx import count_classes, half_onnx
from rd_deploy.export.files import OUTPUT
from rd_deploy.trt.flavours import context_bytes, load_flavour


class TensorRtSession(DeviceSession):
    """A network as an engine of one flavour, built for the GPU at hand."""

    def __init__(self, engine: "TensorRt", model: onnx.ModelProto, precision: str, threads: int, batch: int):
        super().__init__(engine, model, precision, threads, batch)
        half = half_onnx(model, batch, precision)
        self._output = self._torch.zeros(batch, count_classes(half), dtype=self.dtype, device=self.device)
        try:
            self._prepare(half.SerializeToString(), engine.flavour)
            self._capture(self._forward)
        except UserError as reason:  # the arguments are checked: it is the network or the GPU
            raise Unsupported(str(reason)) from reason

    def _prepare(self, model: bytes, name: str) -> None:
        from rd_deploy.trt.build import Profile, build, choose_targets
        from rd_deploy.trt.messages import Messages

        self._flavour = flavour = load_flavour(name)
        major, minor = self._torch.cuda.get_device_capability(self.device)
        targets = choose_targets(flavour, None, self.precision, f"sm{major}{minor}")
        built = build(model, flavour, Profile(self.batch, self.batch, self.batch), targets)
        self._messages = messages = Messages(flavour.module)
        self._runtime = messages.checked(flavour.module.Runtime(messages.logger), "start its runtime")
        plan = self._runtime.deserialize_cuda_engine(built.content)
        self._plan = messages.checked(plan, "load its own engine")
        self._context = messages.checked(self._plan.create_execution_context(), "make an execution context")
        for tensor, memory in ((INPUT, self.images), (OUTPUT, self._output)):
            taken = self._context.set_tensor_address(tensor, memory.data_ptr())
            messages.checked(taken, f"take the memory of {tensor}")

    @property
    def variant(self) -> str:
        return self._flavour.title

    def _forward(self):
        stream = self._torch.cuda.current_stream().cuda_stream
        self._messages.checked(self._context.execute_async_v3(stream), "run the network")
        return self._output

    def _feature_maps(self) -> tuple[Figure, ...]:
        found = context_bytes(self._plan)
        how = "device memory of an execution context: maps and workspaces in TensorRT's own plan"
        missing = "this TensorRT tells no device memory size"
        return (Figure(f"{self.engine.name} context", found, missing if found is None else how),)


class TensorRt(DeviceEngine):
    """Enterprise TensorRT. ``flavour``: its name in `rd_deploy.trt.flavours`, where it is also that of the extra."""

    name = "tensorrt"
    package = "tensorrt"
    flavour = extra = "tensorrt"

    def missing(self) -> str | None:
        return no_gpu() or Engine.missing(self)

    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        return TensorRtSession(self, model, precision, threads, batch)


class TensorRtRtx(TensorRt):
    """TensorRT-RTX, for GeForce, workstation and DGX Spark GPUs."""

    name = "tensorrt-rtx"
    package = "tensorrt_rtx"
    flavour = extra = "rtx"
