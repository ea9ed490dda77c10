"""TensorRT. Written against its documentation: never run by us yet.

A strongly typed network, whose precision is that of the ONNX file, for one batch size; it runs on torch's streams and
in torch's memory, recorded as one CUDA graph.
"""

import onnx

from rd_deploy.engines.base import Engine, Figure, Session, Unsupported
from rd_deploy.engines.device import DeviceEngine, DeviceSession
from rd_deploy.engines.half_onnx import IMAGES, LOGITS, half_onnx
from rd_deploy.engines.torch_cuda import TorchCuda

OPTIMIZATION_LEVEL = 5  # of 5: compares the most kernels; 3 is the default
WORKSPACE_SHARE = 0.25  # of the GPU's memory: the most that a kernel may ask for


class TensorRtSession(DeviceSession):
    """A float16 network as a TensorRT engine, built when loaded."""

    def __init__(self, engine: Engine, model: onnx.ModelProto, precision: str, threads: int, batch: int):
        super().__init__(engine, model, precision, threads, batch)
        torch = self._torch
        half = half_onnx(model, batch)
        classes = half.graph.output[0].type.tensor_type.shape.dim[1].dim_value
        self._output = torch.zeros(batch, classes, dtype=self.dtype, device=self.device)
        workspace = int(torch.cuda.get_device_properties(self.device).total_memory * WORKSPACE_SHARE)
        self._log = _Messages()
        plan = _build(half.SerializeToString(), workspace, self._log)
        self._runtime = _trt().Runtime(self._log.logger)
        self._engine = self._log.checked(self._runtime.deserialize_cuda_engine(plan), "load its own engine")
        self._context = self._log.checked(self._engine.create_execution_context(), "make an execution context")
        self._context.set_tensor_address(IMAGES, self.images.data_ptr())
        self._context.set_tensor_address(LOGITS, self._output.data_ptr())
        self._capture(self._forward)

    @property
    def variant(self) -> str:
        return f"TensorRT {_trt().__version__}"

    def _forward(self):
        stream = self._torch.cuda.current_stream().cuda_stream
        self._log.checked(self._context.execute_async_v3(stream), "run the network")
        return self._output

    def _feature_maps(self) -> tuple[Figure, ...]:
        names = ("device_memory_size_v2", "device_memory_size")
        found = next((getattr(self._engine, name) for name in names if hasattr(self._engine, name)), None)
        how = "device memory of an execution context: maps and workspaces in TensorRT's own plan"
        return (Figure("tensorrt context", found, how if found else "this TensorRT tells no device memory size"),)


class _Messages:
    """TensorRT's errors: its calls return None or False and log the reason."""

    def __init__(self):
        trt, errors = _trt(), []

        class Logger(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)

            def log(self, severity, message):
                if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                    errors.append(message)

        self.logger, self._errors = Logger(), errors

    def checked(self, result, what: str):
        """A call's result, or `Unsupported` with the first logged error; later ones mostly follow from it."""
        if result:
            return result
        reason = " ".join(self._errors[0].split())[:160] if self._errors else "it gives no reason"
        raise Unsupported(f"TensorRT cannot {what}: {reason}")


class TensorRt(DeviceEngine):
    """TensorRT, fp16."""

    name = "tensorrt"
    package = "tensorrt"
    extra = "tensorrt"

    def missing(self) -> str | None:
        return TorchCuda().missing() or Engine.missing(self)

    def _load(self, model: onnx.ModelProto, precision: str, threads: int, batch: int) -> Session:
        if precision != "fp16":
            raise Unsupported(f"our ONNX files for TensorRT are fp16, not {precision}")
        return TensorRtSession(self, model, precision, threads, batch)


def _trt():
    import tensorrt

    return tensorrt


def _build(model: bytes, workspace: int, log: _Messages):
    """The serialised engine of an ONNX file with fixed shapes."""
    trt = _trt()
    builder = trt.Builder(log.logger)
    flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind from TensorRT 11 on
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(model) or network.num_outputs != 1:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reason = "; ".join(f"{error.node_operator()}: {error.desc()}" for error in errors) or "no reason given"
        raise Unsupported(f"TensorRT cannot parse the network: {' '.join(reason.split())[:160]}")
    config = builder.create_builder_config()
    config.builder_optimization_level = OPTIMIZATION_LEVEL
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    return log.checked(builder.build_serialized_network(network, config), "build the network")
