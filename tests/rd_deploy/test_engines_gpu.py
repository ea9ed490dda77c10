"""The engines for GPUs where there is none: what they say, and the parts of them that need no GPU."""

import ml_dtypes
import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

torch = pytest.importorskip("torch")

from chains import bottlenecks, images_for, reference

from rd_deploy.common import UserError
from rd_deploy.engines import ENGINES, Unsupported, get_engine
from rd_deploy.engines.device import DeviceSession, no_gpu
from rd_deploy.engines.half_onnx import half_onnx
from rd_deploy.engines.torch import run_calls, translate
from rd_deploy.export.onnx import to_onnx

ON_GPU = [name for name, engine in ENGINES.items() if engine.device == "cuda"]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@without_gpu
@pytest.mark.parametrize("name", [name for name in ON_GPU if name != "cuda"])  # which the tests interpret
def test_without_a_gpu_one_line_says_so(name):
    reason = get_engine(name).missing()
    assert reason
    assert "\n" not in reason
    with pytest.raises(UserError) as error:
        get_engine(name).load(to_onnx(bottlenecks()), "fp16", 1, 1)
    assert str(error.value) == reason


@without_gpu
def test_the_reason_names_what_is_missing():
    assert "GPU" in no_gpu() or "CUDA" in no_gpu()


def test_precisions_are_those_of_gpus():
    assert {ENGINES[name].precisions for name in ON_GPU} <= {("fp16", "bf16"), ("fp16",)}
    assert len(ON_GPU) == 8


def test_inductor_makes_constants_of_the_weights(monkeypatch):
    """On the CPU: what `freeze` leaves as an input of the compiled graph is the images alone."""
    from torch._inductor import freezing

    from rd_deploy.engines import inductor_cuda

    chain, left, freeze = bottlenecks(), [], freezing.freeze

    def spied(*given):
        found = freeze(*given)
        left.append(len(found[1]))
        return found

    monkeypatch.setattr(freezing, "freeze", spied)
    model = to_onnx(chain)
    calls, images = translate(model, torch.float32, torch.device("cpu")), torch.from_numpy(images_for(chain, 2))
    network = inductor_cuda.compiled(
        lambda x: run_calls(calls, {"images": x}, "logits"), images, {"freezing": True, "max_autotune": False}
    )
    with torch.inference_mode():
        logits = network(images).numpy()
    assert left == [1]  # once: the second call compiled nothing
    assert np.abs(logits - reference(chain, images.numpy())).max() < 1e-3


@pytest.mark.parametrize("shortcuts", [False, True])
def test_the_fp16_file_takes_channels_last_images_and_gives_the_logits(shortcuts):
    """In ONNX Runtime on the CPU, which computes it in float32 between float16 tensors."""
    import onnxruntime

    chain = bottlenecks(shortcuts=shortcuts)
    images = images_for(chain, 2)
    expected = reference(chain, images)
    model = half_onnx(to_onnx(chain), batch=2)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.transpose(0, 2, 3, 1).astype(np.float16)})
    assert logits.dtype == np.float16
    assert np.abs(logits - expected).max() / expected.std() < 0.02


def test_the_bf16_file_computes_the_same_network():
    """In ONNX's own reference, which knows bf16 and rounds every result to it."""
    chain = bottlenecks()
    images = images_for(chain, 2)
    expected = reference(chain, images)
    model = half_onnx(to_onnx(chain), batch=2, precision="bf16")
    given = images.transpose(0, 2, 3, 1).astype(ml_dtypes.bfloat16)
    (logits,) = ReferenceEvaluator(model).run(["logits"], {"images": given})
    assert logits.dtype == ml_dtypes.bfloat16
    assert np.abs(logits.astype(np.float32) - expected).max() / expected.std() < 0.2


# TensorRT-RTX, which builds without a GPU --------------------------------------------------------------------------


@pytest.fixture
def of_a_gpu(monkeypatch):
    """A function that loads a network on TensorRT-RTX as if there were a GPU of that compute capability."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")
    monkeypatch.setattr(DeviceSession, "_find_device", lambda session: torch.device("cpu"))
    engine = get_engine("tensorrt-rtx")

    def load(capability: tuple[int, int], precision: str):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return engine._load(to_onnx(bottlenecks()), precision, 1, 2)

    return load


@without_gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_tensorrt_builds_the_file_and_says_why_it_cannot_run(of_a_gpu, precision):
    """A real build; what it needs a GPU for comes after, and gives no engine."""
    with pytest.raises(Unsupported, match=r"^TensorRT cannot (start its runtime|load its own engine): [^\n]+$"):
        of_a_gpu((8, 9), precision)


def test_tensorrt_rtx_refuses_data_centre_gpus(of_a_gpu):
    with pytest.raises(Unsupported, match="has no target sm90, the GPU here"):
        of_a_gpu((9, 0), "fp16")
