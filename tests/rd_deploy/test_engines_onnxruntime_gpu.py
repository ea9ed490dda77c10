"""ONNX Runtime's providers for GPUs where there is no GPU: they are refused in one line, and never replaced by the CPU.

With the usual onnxruntime the providers are missing; tests that need onnxruntime-gpu or NVIDIA's plugin skip.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from chains import bottlenecks, reference

from rd_deploy.engines import get_engine, onnxruntime_rtx, onnxruntime_tensorrt
from rd_deploy.engines.base import Engine, Unsupported
from rd_deploy.engines.device import DeviceSession
from rd_deploy.engines.half_onnx import half_onnx
from rd_deploy.engines.onnxruntime_gpu import ProviderSession, create_session, reason
from rd_deploy.engines.onnxruntime_rtx import OnnxRuntimeRtx
from rd_deploy.export.onnx import to_onnx

CUDA, AZURE, CPU = "CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
with_providers = pytest.mark.skipif(
    CUDA not in onnxruntime.get_available_providers(), reason="onnxruntime-gpu is not installed here"
)


@pytest.fixture(scope="module")
def model() -> bytes:
    return half_onnx(to_onnx(bottlenecks()), batch=1).SerializeToString()


def engine_of(provider: str) -> SimpleNamespace:
    """What `create_session` needs of an engine; the real ONNX Runtime answers."""

    def start(model, options, settings):
        return onnxruntime.InferenceSession(model, options, providers=[(provider, settings)], enable_fallback=0)

    return SimpleNamespace(provider=provider, start=start)


def refusal(engine, model: bytes, settings: dict | None = None) -> str:
    with pytest.raises(Unsupported) as error:
        create_session(engine, model, settings or {}, threads=1)
    assert "\n" not in str(error.value)
    return str(error.value)


# What ONNX Runtime does, and what is said of it -------------------------------------------------------------------


@without_gpu
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_refused(model):
    """ONNX Runtime alone would run everything on the CPU: it lacks the provider, or the provider a GPU."""
    said = refusal(engine_of(CUDA), model)
    assert said.startswith((f"{CUDA} did not start", f"{CUDA} cannot run the network: CUDA failure"))


@pytest.mark.skipif(
    AZURE not in onnxruntime.get_available_providers(), reason="this onnxruntime has no provider that takes no nodes"
)
def test_nodes_left_to_the_cpu_are_refused_by_name(model):
    """A real provider that starts, and takes none of these nodes."""
    said = refusal(engine_of(AZURE), model)
    assert said == f"{AZURE} leaves Conv, Flatten, Gemm, GlobalAveragePool, MaxPool, Relu, Transpose to the CPU"


def test_a_model_that_is_refused_gives_its_reason():
    assert "protobuf parsing failed" in refusal(engine_of(CPU), b"no model")


def test_a_session_of_another_provider_is_refused(model):
    """Should a version of ONNX Runtime ever fall back in spite of all: what runs is asked for."""
    silent = SimpleNamespace(get_providers=lambda: [CPU])
    assert "did not start" in refusal(SimpleNamespace(provider=CUDA, start=lambda *given: silent), model)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Failed to load library /a/b.so with error: libcuda.so.1: cannot open\n\n",
            "Failed to load library b.so with error: libcuda.so.1: cannot open",
        ),
        (
            "/src/info.cc:63 static Info Info::From(const ProviderOptions&) [ONNXRuntimeError] : 1 : FAIL :"
            ' provider_options_utils.h:182 Parse Unknown provider option: "no_such".\n',
            'provider_options_utils.h:182 Parse Unknown provider option: "no_such".',
        ),
        (
            "/src/cuda_call.cc:154 onnxruntime::CudaCall(ERRTYPE, int) [with ERRTYPE = cudaError; Status = void] "
            "/src/cuda_call.cc:146 onnxruntime::CudaCall(ERRTYPE, int) [with ERRTYPE = cudaError; Status = void] "
            "CUDA failure 35: CUDA driver version is insufficient ; GPU=-1 ; hostname=vm ; file=/src/x.cc ; line=355",
            "CUDA failure 35: CUDA driver version is insufficient",
        ),
        (
            "/src/state.cc:1220 Factory Create(const SessionOptions&, const Map&) Invalid TensorRT EP option: no_such",
            "Invalid TensorRT EP option: no_such",
        ),
        (
            "[ONNXRuntimeError] : 11 : EP_FAIL : [NvTensorRTRTX EP] Failed to create serialized engine",
            "[NvTensorRTRTX EP] Failed to create serialized engine",
        ),
        ("", "RuntimeError"),
    ],
)
def test_the_reason_is_what_onnxruntime_means(text, said):
    """Messages of onnxruntime-gpu 1.31.1 and the plugin 0.5.0, their signatures shortened."""
    assert reason(RuntimeError(text)) == said


# The session ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The GPU's place is taken by the CPU, for everything but memory figures and graphs."""
    stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None)

    def capture(session, forward, own_graph):
        assert own_graph  # a graph around the provider's own one cannot be recorded
        session.logits, session._replay = forward(), forward

    monkeypatch.setattr(DeviceSession, "_find_device", lambda session: torch.device("cpu", 0))
    monkeypatch.setattr(DeviceSession, "_capture", capture)
    monkeypatch.setattr(ProviderSession, "_taken", lambda session: 0)
    for name, value in (("Stream", lambda: stream), ("current_stream", lambda: stream), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)


def test_the_bound_memory_is_read_and_written(on_the_cpu):
    """Channels-last images where torch has them, logits where torch looks for them, new ones in every run."""

    class OnCpu(get_engine("onnxruntime-cuda").__class__):
        provider = CPU

        def start(self, model, options, settings):
            return onnxruntime.InferenceSession(model, providers=[CPU])

    chain = bottlenecks()
    session = ProviderSession(OnCpu(), to_onnx(chain), "fp16", 1, 2)
    for seed in (0, 1):
        images = np.random.default_rng(seed).standard_normal(session.shape).astype(np.float32)
        expected = reference(chain, images)
        logits = session.run(images)
        assert logits.dtype == np.float32
        assert np.abs(logits - expected).max() / expected.std() < 0.02
    (figure,) = session.feature_maps()
    assert figure.source == "onnxruntime-cuda session"


# What is missing --------------------------------------------------------------------------------------------------


@pytest.fixture
def built_with_cuda(monkeypatch):
    """An onnxruntime-gpu for CUDA 13, to ask."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "TensorrtExecutionProvider", CPU])
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_the_onnxruntime_without_cuda_is_named(name, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [AZURE, CPU])
    assert get_engine(name).no_provider().endswith("was built without CUDA: pip install onnxruntime-gpu in its place")


def test_another_cuda_than_torchs_is_named(built_with_cuda, monkeypatch):
    engine = get_engine("onnxruntime-cuda")
    assert engine.no_provider() is None
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "needs CUDA 13, torch brings CUDA 12" in engine.no_provider()


def test_another_tensorrt_than_the_provider_links_is_named(built_with_cuda, monkeypatch, tmp_path):
    library = tmp_path / onnxruntime_tensorrt.LIBRARY
    library.parent.mkdir()
    library.write_bytes(b"\0libnvinfer.so.987\0libnvonnxparser.so.987\0libnvinfer.so.987\0libc.so.6\0")
    assert onnxruntime_tensorrt.linked_libraries(library) == ["libnvinfer.so.987", "libnvonnxparser.so.987"]
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))
    said = get_engine("onnxruntime-tensorrt").no_provider()
    assert "libnvinfer.so.987: cannot open shared object file" in said
    assert said.endswith("pip install 'tensorrt-cu13==987.*'")
    assert "\n" not in said


@pytest.fixture
def plugin(monkeypatch):
    """A function that puts a plugin in the place of NVIDIA's: ``register`` is called, ``offered`` are its devices."""

    def install(register, offered=()):
        fake = SimpleNamespace(__version__="0.5.0", get_library_path=lambda: "/plugin.so")
        monkeypatch.setitem(sys.modules, onnxruntime_rtx.PACKAGE, fake)
        monkeypatch.setattr(onnxruntime, "register_execution_provider_library", register)
        monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: list(offered))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        onnxruntime_rtx.register.cache_clear()
        return OnnxRuntimeRtx()

    yield install
    onnxruntime_rtx.register.cache_clear()


def device(name: str, index: int) -> SimpleNamespace:
    return SimpleNamespace(ep_name=name, memory_info=lambda kind: SimpleNamespace(device_id=index))


def test_a_plugin_that_cannot_be_loaded_is_a_reason(plugin):
    def register(name, path):
        assert (name, path) == ("NvTensorRTRTXExecutionProvider", "/plugin.so")
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Failed to load library /lib/plugin.so")

    said = plugin(register).no_provider()
    assert said.endswith(f"cannot load {onnxruntime_rtx.PACKAGE} 0.5.0: Failed to load library plugin.so")


def test_a_gpu_that_the_plugin_does_not_offer_is_a_reason(plugin):
    calls = []
    engine = plugin(lambda *given: calls.append(given), [device(CPU, 1), device(onnxruntime_rtx.PROVIDER, 0)])
    assert "does not offer the GPU here, sm_90" in engine.no_provider()
    assert engine.no_provider()
    assert len(calls) == 1  # a second registration of a library is an error in ONNX Runtime


def test_the_plugins_device_is_that_of_torch(plugin):
    wanted = device(onnxruntime_rtx.PROVIDER, 1)
    engine = plugin(lambda *given: None, [device(CPU, 1), device(onnxruntime_rtx.PROVIDER, 0), wanted])
    assert engine.no_provider() is None
    assert onnxruntime_rtx.find_device(1) is wanted


# The real libraries -----------------------------------------------------------------------------------------------


@without_gpu
@with_providers
@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_the_real_providers_do_not_start_without_a_gpu(name, model, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1 << 34))
    engine = get_engine(name)
    said = refusal(engine, model, engine.settings(torch.device("cuda", 0), 1234))
    assert said.startswith(engine.provider)
    assert "Falling back" not in capfd.readouterr().out  # as ONNX Runtime's Python wrapper does by default


@without_gpu
@with_providers
def test_the_real_tensorrt_provider_names_the_tensorrt_it_links():
    names = onnxruntime_tensorrt.linked_libraries(Path(onnxruntime.__file__).parent / onnxruntime_tensorrt.LIBRARY)
    assert [name.partition(".so.")[0] for name in names] == ["libnvinfer", "libnvonnxparser"]


@without_gpu
def test_the_real_plugin_offers_nothing_without_a_gpu():
    if Engine.missing(OnnxRuntimeRtx()):
        pytest.skip(f"{onnxruntime_rtx.PACKAGE} is not installed here")
    said = onnxruntime_rtx.register()
    if said is None:  # there is a driver's library, and no GPU
        assert onnxruntime_rtx.find_device(0) is None
    else:
        assert "libcuda" in said
        assert "\n" not in said
