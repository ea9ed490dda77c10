"""`rd_deploy.trt.Session` on the GPU and the TensorRT of fake_gpu.py, which compute, are lazy and notice races."""

import gc
import inspect
import re
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fake_gpu
import numpy as np
import onnx
import pytest
from fake_gpu import FOREIGN, PRIMARY, Engine, FakeGpu, Race, World, array_of, fake_trt
from onnx import helper, numpy_helper

from rd_deploy.common import UserError
from rd_deploy.preprocessing import Preprocessing
from rd_deploy.trt import session as module
from rd_deploy.trt.arrays import read_array, stream_handle
from rd_deploy.trt.build import Profile
from rd_deploy.trt.device import LEGACY_STREAM, Gpu
from rd_deploy.trt.engine_file import EngineFile
from rd_deploy.trt.flavours import Flavour
from rd_deploy.trt.session import MAX_GRAPHS, Session

SHAPE, CLASSES = (3, 8, 8), 5  # an image is 768 bytes: a multiple of 256, as TensorRT wants of addresses
RNG = np.random.default_rng(0)
WEIGHTS = RNG.standard_normal((int(np.prod(SHAPE)), CLASSES)).astype(np.float32)
BIAS = RNG.standard_normal(CLASSES).astype(np.float32)
DOCS = Path(__file__).parents[2] / "docs" / "tensorrt-runtime.md"


def images(count: int) -> np.ndarray:
    return RNG.standard_normal((count, *SHAPE)).astype(np.float32)


def expected(batch: np.ndarray) -> np.ndarray:
    return batch.reshape(len(batch), -1).astype(np.float64) @ WEIGHTS.astype(np.float64) + BIAS


def check(logits: np.ndarray, batch: np.ndarray) -> None:
    np.testing.assert_allclose(logits, expected(batch), rtol=1e-4, atol=1e-4)


def network() -> bytes:
    """A linear network with a free batch, whose logits NumPy computes too."""
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(WEIGHTS, "weights"), numpy_helper.from_array(BIAS, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


NETWORK = network()


@pytest.fixture
def world(monkeypatch) -> World:
    """A fresh GPU; afterwards, nothing of it is in use and no context is left current."""
    world = World()
    gpu = type("TestGpu", (FakeGpu,), {"world": world})
    monkeypatch.setattr(module, "Gpu", gpu)
    monkeypatch.setattr(module, "no_gpu", lambda: None)
    return world


def engine(world: World, profile: tuple[int, int, int] = (1, 4, 8), rtx: bool = False, **changes) -> EngineFile:
    trt = fake_trt(world, profile[0], profile[2], rtx)
    values = {
        "path": Path("net.engine"),
        "content": NETWORK,
        "flavour": Flavour("rtx" if rtx else "tensorrt", trt),
        "profile": Profile(*profile),
        "targets": ("sm80", "sm89"),
        "input_shape": SHAPE,
        "classes": tuple("abcde"),
        "preprocessing": Preprocessing(size=8, resize=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3),
        "activation_bytes": 4096,
        "rebuild": "rd-export net.onnx --trt",
        "sidecar": {"engine": {"flavour": "rtx", "targets": ["sm80"], "profile": list(profile), "onnx": "net.onnx"}},
    }
    return EngineFile(**values | changes)


def session(world: World, **options) -> Session:
    made = {name: options.pop(name) for name in ("device", "batch", "cuda_graph") if name in options}
    return Session(engine(world, **options), **made)


def count(world: World, name: str) -> int:
    return sum(entry == name for entry, _ in world.log)


# From the host's memory


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("rtx", [True, False])
def test_run_gives_the_networks_logits_for_any_batch(world, cuda_graph, rtx):
    with session(world, cuda_graph=cuda_graph, rtx=rtx) as run:
        results = [(batch, run.run(batch)) for batch in map(images, (8, 1, 3, 8, 1))]
        for batch, logits in results:  # only now: each result has memory of its own
            check(logits, batch)
    assert world.live == 0


def test_later_runs_of_a_batch_size_replay_its_graph(world):
    with session(world) as run:
        for size in (2, 3, 2, 2):
            run.run(images(size))
        assert count(world, "network") == 2  # each size once, to warm up
        assert count(world, "graph") == 4


def test_without_a_graph_every_run_is_launched(world):
    with session(world, cuda_graph=False) as run:
        for _ in range(3):
            run.run(images(2))
        assert (count(world, "network"), count(world, "graph")) == (3, 0)


def test_graphs_are_bounded_and_recorded_again(world):
    with session(world, profile=(1, 8, MAX_GRAPHS + 2)) as run:
        for size in (*range(1, MAX_GRAPHS + 3), 1, MAX_GRAPHS + 2):
            batch = images(size)
            check(run.run(batch), batch)
        assert len(run._network._recorded) == MAX_GRAPHS
        assert count(world, "network") == MAX_GRAPHS + 3  # 1 was forgotten, the last was not


def test_the_graph_that_was_not_used_for_longest_goes_first(world):
    with session(world, profile=(1, 8, MAX_GRAPHS + 1)) as run:
        for size in range(1, MAX_GRAPHS + 1):
            run.run(images(size))
        oldest, second = (run._network._recorded[size].graph for size in (1, 2))
        run.run(images(1))
        run.run(images(MAX_GRAPHS + 1))
        assert (oldest.closed, second.closed) == (False, True)
    assert oldest.closed


def test_images_of_any_strides_are_copied(world):
    with session(world) as run:
        batch = images(4)
        last = np.ascontiguousarray(batch.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        assert not last.flags.c_contiguous
        check(run.run(last), batch)
        check(run.run(batch[::2]), batch[::2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (images(2).astype(np.float64), "images must be float32, not float64; see Session.preprocessing"),
        (images(2)[:, :2], r"images must be \(N, 3, 8, 8\), not \(2, 2, 8, 8\)"),
        (images(1)[0], r"images must be \(N, 3, 8, 8\), not \(3, 8, 8\)"),
        (images(9), "this session takes 2 to 8 images, not 9$"),
        (images(1), "this session takes 2 to 8 images, not 1$"),
        (images(0), "this session takes 2 to 8 images, not 0$"),
        ([[0.0]], "images must be a NumPy array, not list"),
    ],
)
def test_wrong_images_are_one_line(world, wrong, message):
    with session(world, profile=(2, 4, 8)) as run:
        with pytest.raises(UserError, match=message):
            run.run(wrong)
        batch = images(2)
        check(run.run(batch), batch)  # and harmless


def test_run_points_to_run_device(world):
    with session(world) as run, pytest.raises(UserError, match="not Array; run_device takes it"):
        run.run(world.array(images(2)))


def test_a_smaller_batch_needs_less_memory(world):
    with session(world, batch=2) as run:
        assert max(len(block.bytes) for block in world.blocks if block.alive) < 8 * 768
        batch = images(2)
        check(run.run(batch), batch)
        with pytest.raises(UserError, match="takes 1 to 2 images, not 3, the engine at most 8"):
            run.run(images(3))
    for batch in (0, 9):
        with pytest.raises(
            UserError, match=f"batch {batch}: net.engine takes 1 to 8; rd-export net.onnx --trt rebuilds"
        ):
            session(world, batch=batch)


def test_what_a_session_says_of_its_engine(world):
    with session(world) as run:
        assert run.classes == tuple("abcde")
        assert (run.profile, run.batch, run.activation_bytes) == (Profile(1, 4, 8), 8, 4096)
        photos = RNG.integers(0, 256, (2, 8, 8, 3), np.uint8)
        check(run.run(run.preprocessing.apply(photos)), (photos.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5)


# Arrays in the GPU's memory


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_arrays_are_used_where_they_lie(world, cuda_graph):
    with session(world, cuda_graph=cuda_graph) as run:
        batch = images(3)
        given, target = world.array(batch), world.array(np.zeros((3, CLASSES), np.float32))
        before = len(world.blocks)
        assert run.run_device(given, target) is target
        check(target.read(world.legacy), batch)
        assert not count(world, "copy in")
        assert not count(world, "graph")  # a graph is bound to addresses, and these are not the session's
        assert len(world.blocks) == before


def test_the_sessions_own_memory_replays_a_graph(world):
    with session(world) as run:
        for size in (4, 2, 4):
            batch = images(size)
            array_of(world, run.images(size)).fill(batch, world.legacy)
            logits = run.run_device(run.images(size))
            check(array_of(world, logits).read(world.legacy), batch)
        assert count(world, "graph") == 3
        assert array_of(world, logits).address == array_of(world, run.logits(4)).address


def test_own_images_to_foreign_logits_is_no_replay(world):
    with session(world) as run:
        batch, target = images(2), world.array(np.zeros((2, CLASSES), np.float32))
        array_of(world, run.images(2)).fill(batch, world.legacy)
        run.run_device(run.images(2), target)
        check(target.read(world.legacy), batch)
        assert not count(world, "graph")


def test_it_runs_in_the_order_of_the_callers_stream(world):
    with session(world) as run:
        mine, given = world.stream(), world.array(images(2))
        for own in (False, True, False, True):
            batch = images(2)
            source = array_of(world, run.images(2)) if own else given
            source.fill(batch, mine)
            logits = run.run_device(run.images(2) if own else given, stream=mine.handle)
            assert logits.__cuda_array_interface__["stream"] == mine.handle
            check(array_of(world, logits).read(mine), batch)


def test_it_returns_before_the_work_is_done(world):
    with session(world, cuda_graph=False) as run:
        mine, given = world.stream(), world.array(images(2))
        given.fill(images(2), mine)
        run.run_device(given, stream=mine.handle)
        assert mine.queue


def test_a_stream_that_the_images_name_is_waited_for(world):
    with session(world) as run:
        producer, consumer, batch = world.stream(), world.stream(), images(2)
        given = world.array(np.zeros_like(batch), stream=producer.handle)
        given.fill(batch, producer)
        check(array_of(world, run.run_device(given, stream=consumer.handle)).read(consumer), batch)
        given.fill(batch + 1, producer)  # and the producer comes after what reads
        logits = run.run_device(given)
        check(array_of(world, logits).read(producer), batch + 1)


def test_a_stream_that_the_logits_name_is_waited_for(world):
    with session(world) as run:
        reader, mine, batch = world.stream(), world.stream(), images(2)
        target = world.array(np.zeros((2, CLASSES), np.float32), stream=reader.handle)
        target.fill(np.ones((2, CLASSES), np.float32), reader)
        run.run_device(world.array(batch), target, stream=mine.handle)
        check(target.read(reader), batch)


def test_without_a_stream_it_keeps_the_order_of_the_default_one(world):
    with session(world) as run:
        given = world.array(images(2))
        for _ in range(3):
            batch = images(2)
            given.fill(batch, world.legacy)
            check(array_of(world, run.run_device(given)).read(world.legacy), batch)


def test_control_a_stream_that_is_not_named_is_a_race(world):
    with session(world) as run:
        given = world.array(images(2))
        given.fill(images(2), world.stream())
        with pytest.raises(Race):
            run.run_device(given)


def test_runs_on_several_streams_take_turns_with_the_maps_memory(world):
    with session(world) as run:
        streams, batches = [world.stream() for _ in range(3)], [images(2) for _ in range(3)]
        targets = [world.array(np.zeros((2, CLASSES), np.float32)) for _ in streams]
        for stream, batch, target in zip(streams, batches, targets, strict=True):
            run.run_device(world.array(batch), target, stream=stream.handle)
        check(run.run(batches[0]), batches[0])
        for stream, batch, target in zip(streams, batches, targets, strict=True):
            check(target.read(stream), batch)


def test_control_two_sessions_share_no_memory(world):
    with session(world) as one, session(world) as other:
        batches, streams = [images(2), images(2)], [world.stream(), world.stream()]
        logits = [
            run.run_device(world.array(batch), stream=stream.handle)
            for run, batch, stream in zip((one, other), batches, streams, strict=True)
        ]
        for array, batch, stream in zip(logits, batches, streams, strict=True):
            check(array_of(world, array).read(stream), batch)


def test_a_graph_recorded_late_waits_for_the_readers_of_the_last_logits(world):
    with session(world) as run:
        mine, batch = world.stream(), images(2)
        array_of(world, run.images(2)).fill(batch, mine)
        logits = array_of(world, run.run_device(run.images(2), stream=mine.handle))
        found, view = np.empty((2, CLASSES), np.float32), world.floats(logits.address, logits.shape)
        mine.put("read", lambda: np.copyto(found, view), reads=[logits.address])
        run.run_device(run.images(3), stream=mine.handle)  # records, which writes the same logits
        mine.sync()
        check(found, batch)


def bad(world: World, what: str) -> object:
    """An array of two images with something wrong."""
    batch = images(2)
    changes = {
        "version": {"version": 4},
        "type": {"typestr": "<f2"},
        "strides": {"strides": (768, 4, 96, 12)},
        "mask": {"mask": object()},
        "null": {"data": (0, False)},
        "aligned": {"data": (world.array(images(3)).address + 4, False)},
        "zero stream": {"stream": 0},
        "elsewhere": {"ordinal": 1},
        "context": {"context": FOREIGN},
        "shape": {"shape": (2, 3, 8)},
        "many": {"shape": (9, *SHAPE)},
        "host": {"data": (1 << 20, False)},
    }
    return world.array(batch, **changes[what])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("version", "images has version 4 of __cuda_array_interface__"),
        ("type", "images must be float32, not float16: cast it on the GPU"),
        ("strides", r"images must be contiguous \(NCHW, in C order\), not with strides \(768, 4, 96, 12\)"),
        ("mask", "images is masked"),
        ("null", "images must start at a multiple of 256 bytes, not at 0x0"),
        ("aligned", "images must start at a multiple of 256 bytes"),
        ("zero stream", "images names the stream 0, which the interface forbids"),
        ("elsewhere", "images is on GPU 1, the session on 0: make it with device=1"),
        ("context", "images is of another CUDA context than the session"),
        ("shape", r"images must be \(N, 3, 8, 8\), not \(2, 3, 8\)"),
        ("many", "this session takes 1 to 8 images, not 9"),
        ("host", "images lies at 0x100000, which is no memory of a GPU"),
    ],
)
def test_wrong_arrays_are_one_line(world, what, message):
    with session(world) as run, pytest.raises(UserError, match=message) as caught:
        run.run_device(bad(world, what))
    assert "\n" not in str(caught.value)
    assert not count(world, "network")


def test_wrong_logits_are_one_line(world):
    with session(world) as run:
        given = world.array(images(2))
        for shape, changes, message in (
            ((3, CLASSES), {}, r"logits must be \(2, 5\), not \(3, 5\)"),
            ((2, CLASSES + 1), {}, r"logits must be \(2, 5\), not \(2, 6\)"),
            ((2, CLASSES), {"typestr": "<f8"}, "logits must be float32, not float64"),
        ):
            with pytest.raises(UserError, match=message):
                run.run_device(given, world.array(np.zeros(shape, np.float32), **changes))
        target = world.array(np.zeros((2, CLASSES), np.float32))
        target.__cuda_array_interface__["data"] = (target.address, True)
        with pytest.raises(UserError, match="logits is read-only"):
            run.run_device(given, target)


def test_what_has_no_interface_is_told_what_to_do(world):
    with session(world) as run:
        with pytest.raises(UserError, match="unlike ndarray; run\\(\\) takes NumPy arrays"):
            run.run_device(images(2))
        with pytest.raises(UserError, match="unlike list; torch, pycuda and cupy make such"):
            run.run_device([1.0])


def test_a_torch_tensor_on_the_cpu_or_with_a_gradient():
    torch = pytest.importorskip("torch")
    with pytest.raises(
        UserError, match="images must be in a GPU's memory, with __cuda_array_interface__, unlike Tensor"
    ):
        read_array(torch.zeros(1), "images")

    class NeedsGradient:
        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("Can't get it on Variable that requires grad.\nuse var.detach()")

    with pytest.raises(UserError, match=r"images cannot be used: .* use var\.detach"):
        read_array(NeedsGradient(), "images")


def test_strides_of_c_order_are_contiguous(world):
    """pycuda always gives strides; a dimension of one element may have any."""
    array = world.array(images(2), strides=(768, 256, 32, 4))
    assert read_array(array, "images").shape == (2, *SHAPE)
    assert read_array(world.array(images(1), strides=(4, 256, 32, 4)), "images").shape == (1, *SHAPE)
    with pytest.raises(UserError, match="contiguous"):
        read_array(world.array(images(2), strides=(1536, 256, 32, 4)), "images")


def test_an_interface_without_an_entry(world):
    array = world.array(images(2))
    del array.__cuda_array_interface__["typestr"]
    with pytest.raises(UserError, match="without typestr"):
        read_array(array, "images")


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (0, LEGACY_STREAM),
        (7, 7),
        (SimpleNamespace(cuda_stream=7), 7),
        (SimpleNamespace(handle=7), 7),
        (SimpleNamespace(ptr=0), LEGACY_STREAM),
        (SimpleNamespace(__cuda_stream__=lambda: (0, 7), handle=object()), 7),
    ],
)
def test_streams_of_all_libraries(stream, handle):
    assert stream_handle(stream) == handle


@pytest.mark.parametrize("wrong", ["default", -1, True, 1.0, object(), SimpleNamespace(handle="7")])
def test_what_is_no_stream(wrong):
    with pytest.raises(UserError, match="stream must be a CUDA stream or its handle"):
        stream_handle(wrong)


# Contexts and devices


def test_it_works_in_the_context_that_is_current(world):
    """pycuda's contexts are not the primary one."""
    world.contexts.append(FOREIGN)
    run, mine = session(world), world.stream(FOREIGN)
    batch = images(2)
    given = world.array(batch, context=FOREIGN)
    check(array_of(world, run.run_device(given, stream=mine.handle)).read(mine), batch)
    world.contexts.append(0xC0)  # and comes back to it from another
    check(run.run(batch), batch)
    assert world.contexts == [FOREIGN, 0xC0]
    with pytest.raises(UserError, match="the stream is of another CUDA context"):
        run.run_device(given, stream=world.stream().handle)
    run.close()
    assert world.contexts == [FOREIGN, 0xC0]
    assert not any(block.alive for block in world.blocks if block.context == FOREIGN and block.address != given.address)


def test_the_other_gpu(world):
    with session(world, device=1) as run:
        batch = images(2)
        check(run.run(batch), batch)
        with pytest.raises(UserError, match="images is on GPU 0, the session on 1: make it with device=0"):
            run.run_device(world.array(batch))
    with pytest.raises(UserError, match="there is no GPU 2; those visible here are 0 to 1"):
        session(world, device=2)


def test_a_gpu_that_the_engine_is_not_for(world):
    with pytest.raises(UserError, match=r"net\.engine is for sm80, sm90, and the GPU is sm89; build it again: rd-ex"):
        session(world, targets=("sm80", "sm90"))
    assert world.live == 0


# Failures and ends


def test_without_a_gpu_tensorrt_is_not_touched(world, monkeypatch):
    monkeypatch.setattr(module, "no_gpu", lambda: "no GPU here")
    monkeypatch.setattr(module, "Gpu", None)
    with pytest.raises(UserError, match="no GPU here"):
        session(world)


def failing(world: World, monkeypatch, what: str) -> dict:
    """Make something fail when a session is made; returns changes of the engine."""
    if what == "tensors":
        monkeypatch.setattr(Engine, "dtypes", ("float32", "float16"))
    if what == "memory":
        allocate = FakeGpu.allocate

        def limited(gpu, size):
            if size == Engine.device_memory_size_v2:
                raise UserError("CUDA cannot give memory")
            return allocate(gpu, size)

        monkeypatch.setattr(FakeGpu, "allocate", limited)
    return {"content": b"no engine"} if what == "engine" else {}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("engine", "TensorRT cannot load net.engine: magic tag does not match"),
        ("tensors", "net.engine does not read float32 images and write float32 logits"),
        ("memory", "CUDA cannot give memory"),
    ],
)
def test_a_session_that_cannot_be_made_leaves_nothing(world, monkeypatch, what, message):
    file = engine(world, **failing(world, monkeypatch, what))
    with pytest.raises(UserError, match=message):
        Session(file)
    assert (world.live, world.contexts) == (0, [])
    gc.collect()
    assert not file.flavour.module.state.alive


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": tuple("abc")}, r"net\.engine has logits of shape \(5,\), not \(3,\) as its sidecar says: rd-exp"),
        ({"input_shape": (3, 8, 9)}, r"has images of shape \(3, 8, 8\), not \(3, 8, 9\) as its sidecar says: rd-exp"),
    ],
)
def test_a_sidecar_with_other_shapes_than_the_engine(world, changes, message):
    """TensorRT would write more logits than there is memory for, or give each image another's."""
    with pytest.raises(UserError, match=message):
        session(world, **changes)
    assert world.live == 0


def test_an_engine_that_cannot_be_recorded_is_an_error(world, monkeypatch):
    monkeypatch.setattr(FakeGpu, "records", False)
    with session(world) as run:
        for _ in range(2):
            with pytest.raises(UserError, match=r"cannot be recorded as a CUDA graph .*cuda_graph=False runs without"):
                run.run(images(2))
    with session(world, cuda_graph=False) as run:
        batch = images(2)
        check(run.run(batch), batch)


def test_tensorrt_rtx_is_asked_whether_it_can_be_recorded(world):
    file = engine(world, rtx=True)
    file.flavour.module.state.capturable = False
    with (
        Session(file) as run,
        pytest.raises(UserError, match=r"cannot record this engine .*cuda_graph=False\) runs it"),
    ):
        run.run(images(2))


def test_a_run_that_tensorrt_refuses(world):
    file = engine(world)
    file.flavour.module.state.maximum = 2  # unlike the sidecar's
    with (
        Session(file) as run,
        pytest.raises(UserError, match=r"TensorRT cannot take images of shape .* outside the prof"),
    ):
        run.run(images(3))


def test_closing(world):
    run = session(world)
    memory = run.images(2)
    run.run_device(world.array(images(2)), stream=world.stream().handle)
    run.close()
    run.close()
    assert run.closed
    for use in (lambda: run.run(images(1)), lambda: run.run_device(memory), lambda: run.time_device(1)):
        with pytest.raises(UserError, match="this session is closed"):
            use()
    with pytest.raises(UserError, match="this memory was its session's, which is closed"):
        memory.__cuda_array_interface__  # noqa: B018


def test_closing_lets_tensorrt_go_in_its_order(world):
    file = engine(world, rtx=True)
    alive = file.flavour.module.state.alive
    run = Session(file)
    for size in (1, 2):
        run.run(images(size))
    run.run_device(world.array(images(2)))
    assert len(alive) == 5  # the runtime, the engine, three contexts
    run.close()
    assert not alive


def test_a_session_that_nobody_has_is_closed(world):
    run = session(world)
    run.run(images(2))
    logits = run.logits(2)
    del run
    gc.collect()
    assert world.live  # the array keeps the memory that it lies in
    del logits
    gc.collect()
    assert world.live == 0


def test_at_exit_a_session_in_use_is_left_to_the_driver(world, monkeypatch):
    """A daemon thread is in the middle of a run when the interpreter calls what is to be done at exit."""
    run, batch, sync = session(world), images(2), fake_gpu.Stream.sync

    def exit_meanwhile(stream):
        exiting = threading.Thread(target=run._finalizer)
        exiting.start()
        exiting.join()
        sync(stream)

    monkeypatch.setattr(fake_gpu.Stream, "sync", exit_meanwhile)
    check(run.run(batch), batch)
    assert world.live


def test_at_exit_a_session_that_rests_is_closed(world):
    file = engine(world)
    run = Session(file)
    run.run(images(2))
    run._finalizer()
    assert not world.live
    assert not file.flavour.module.state.alive
    with pytest.raises(UserError, match="this session is closed"):
        run.run(images(2))


def test_closing_waits_for_another_threads_call(world, monkeypatch):
    run, batch, sync, closing = session(world), images(2), fake_gpu.Stream.sync, threading.Thread()

    def close_meanwhile(stream):
        nonlocal closing
        if closing.ident is None:
            closing = threading.Thread(target=run.close)
            closing.start()
            closing.join(0.1)
        sync(stream)

    monkeypatch.setattr(fake_gpu.Stream, "sync", close_meanwhile)
    check(run.run(batch), batch)
    closing.join()
    assert not world.live


# Times


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_times(world, cuda_graph):
    with session(world, cuda_graph=cuda_graph) as run:
        batch = images(2)
        logits, timing = run.run_timed(batch)
        check(logits, batch)
        resident = run.time_device(2)
        for found in (timing, resident):
            assert found.graph == cuda_graph
            assert found.host_ms > 0
            assert found.device_ms > 0
        check(array_of(world, run.logits(2)).read(world.legacy), batch)  # what lay there was run again
        names = [name for name, _ in world.log]
        assert names.count("copy in") == 1


# The fake, and the page


def test_the_fake_gpu_has_the_methods_of_the_real_one():
    public = [name for name in vars(Gpu) if not name.startswith("_") or name in ("__enter__", "__exit__", "__init__")]
    for name in public:
        real, fake = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (Gpu, FakeGpu))
        assert real == fake, name


def test_control_the_fake_is_lazy(world):
    stream, array = world.stream(), world.array(np.zeros(4, np.float32))
    array.fill(np.ones(4, np.float32), stream)
    assert not world.floats(array.address, (4,)).any()
    stream.sync()
    assert world.floats(array.address, (4,)).all()


def run_twice(world: World, run: Session) -> None:
    """Runs of two sizes whose results are compared; a control makes this fail."""
    for size in (2, 3, 2):
        batch = images(size)
        check(run.run(batch), batch)


@pytest.mark.parametrize("name", ["copy_in", "copy_out"])
def test_control_a_forgotten_copy(world, monkeypatch, name):
    monkeypatch.setattr(FakeGpu, name, lambda *_: None)
    with session(world) as run, pytest.raises(AssertionError, match="Not equal"):
        run_twice(world, run)


def test_control_a_host_that_does_not_wait(world, monkeypatch):
    with session(world) as run:
        run_twice(world, run)
        with monkeypatch.context() as patch:
            patch.setattr(run._gpu.stream, "sync", lambda: None)
            with pytest.raises(AssertionError, match="Not equal"):
                run_twice(world, run)


def test_control_runs_that_do_not_take_turns(world, monkeypatch):
    with session(world) as run:
        monkeypatch.setattr(run, "_after_last", lambda stream: None)
        run.run_device(world.array(images(2)), stream=world.stream().handle)
        with pytest.raises(Race):
            run.run_device(world.array(images(2)), stream=world.stream().handle)


def test_control_a_recording_without_a_warm_up(world, monkeypatch):
    enqueue = module._Execution.enqueue

    def only_recorded(self, stream):
        if stream.capture is not None:
            enqueue(self, stream)

    monkeypatch.setattr(module._Execution, "enqueue", only_recorded)
    with session(world) as run, pytest.raises(UserError, match="deferred work in a recording"):
        run_twice(world, run)


def test_control_one_context_for_all_graphs(world, monkeypatch):
    create, kept = Engine.create_execution_context, {}
    monkeypatch.setattr(Engine, "create_execution_context", lambda *args: kept.setdefault(0, create(*args)))
    with session(world) as run, pytest.raises(AssertionError, match="Not equal"):
        run_twice(world, run)


def test_the_page_runs(world, monkeypatch):
    """Every Python block of the page, with the stand-in's arrays and streams as torch's, cupy's and pycuda's."""
    monkeypatch.setattr(module, "read_engine", lambda path: engine(world))
    photos = RNG.integers(0, 256, (4, 8, 8, 3), np.uint8)
    for name, fake in libraries(world).items():
        monkeypatch.setitem(sys.modules, name, fake)
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    for block in blocks:
        world.contexts[:] = [FOREIGN] if "pycuda.autoinit" in block else []
        names = {"photos": photos}
        exec(compile(block, str(DOCS), "exec"), names)
        wanted = expected((photos.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5)
        if "timing" not in names:
            labels = [names["session"].classes.index(x) if isinstance(x, str) else x for x in names["labels"]]
            assert labels == wanted.argmax(1).tolist(), block
    assert count(world, "graph") == 1 + 1 + 2  # from the host, into the session's memory, and two that were timed


def library_array(world: World, context: int, version: int = 3) -> type:
    """A class of arrays that does what the page asks of torch's, cupy's and pycuda's, on ``current`` as its stream."""

    class LibraryArray:
        current = (world.legacy,)  # the last is the current one

        def __init__(self, value: object):
            foreign = hasattr(value, "__cuda_array_interface__")
            self.array = array_of(world, value) if foreign else world.array(np.zeros_like(value), context=context)
            if not foreign:
                self.array.fill(value, self.current[-1])

        @classmethod
        def empty(cls, shape: tuple[int, ...], dtype: type) -> "LibraryArray":
            return cls(world.array(np.zeros(shape, dtype), strides=None, context=context))

        @property
        def __cuda_array_interface__(self) -> dict:
            interface = self.array.__cuda_array_interface__ | {"version": version, "strides": None}
            return interface | ({"stream": self.current[-1].handle} if version == 3 else {})

        def copy_(self, other: "LibraryArray") -> None:
            self.array.fill(other.get(), self.current[-1])

        def get(self) -> np.ndarray:
            return self.array.read(self.current[-1])

        def argmax(self, axis: int) -> np.ndarray:
            return self.get().argmax(axis)

        def cuda(self) -> "LibraryArray":
            return self

    return LibraryArray


def libraries(world: World) -> dict[str, ModuleType]:
    """As much of torch, cupy and pycuda as the page uses."""
    tensor, ndarray, gpuarray = (
        library_array(world, context, version) for context, version in ((PRIMARY, 2), (PRIMARY, 3), (FOREIGN, 2))
    )

    class CupyStream:
        def __init__(self, non_blocking: bool):
            self.stream = world.stream()
            self.ptr = self.stream.handle

        def __enter__(self) -> "CupyStream":
            ndarray.current = (world.legacy, self.stream)
            return self

        def __exit__(self, *exception) -> None:
            ndarray.current = (world.legacy,)

    class PycudaStream:
        def __init__(self):
            self.stream = world.stream(FOREIGN)
            self.handle = self.stream.handle

        def synchronize(self) -> None:
            self.stream.sync()

    def to_gpu(values: np.ndarray) -> object:  # which waits, as pycuda's does
        array = gpuarray(values)
        world.legacy.sync()
        return array

    fakes = {
        "torch": {
            "from_numpy": tensor,
            "as_tensor": lambda value, device: tensor(value),
            "cuda": SimpleNamespace(current_stream=lambda: SimpleNamespace(cuda_stream=0)),
        },
        "cupy": {"asarray": ndarray, "cuda": SimpleNamespace(Stream=CupyStream)},
        "pycuda": {},
        "pycuda.autoinit": {},
        "pycuda.driver": {"Stream": PycudaStream},
        "pycuda.gpuarray": {"to_gpu": to_gpu, "empty": gpuarray.empty},
    }
    modules = {name: ModuleType(name) for name in fakes}
    for name, entries in fakes.items():
        vars(modules[name]).update(entries)
    for name in ("autoinit", "driver", "gpuarray"):
        setattr(modules["pycuda"], name, modules[f"pycuda.{name}"])
    return modules
