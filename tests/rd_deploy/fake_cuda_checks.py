"""`rd_deploy.trt.device` and a session on the real cuda-core, above fake_cuda.c in the place of NVIDIA's driver.

Not collected with the other tests: test_trt_device.py runs this file in a process of its own, whose driver is the fake.
"""

import ctypes
import gc
import os

import numpy as np
import pytest

DRIVER = ctypes.CDLL(os.environ["RD_FAKE_CUDA"], ctypes.RTLD_GLOBAL)  # before cuda.bindings looks for libcuda.so.1

from test_trt_session import SHAPE, check, engine, images

from rd_deploy.common import UserError
from rd_deploy.trt.arrays import DeviceArray
from rd_deploy.trt.device import LEGACY_STREAM, Gpu, no_gpu
from rd_deploy.trt.session import Session

PRIMARY, PYCUDA = 0x1001, 0x2001  # the last digit is the GPU, from 1
HANDLE = ctypes.c_size_t
WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
DRIVER.fake_current.restype = HANDLE
DRIVER.fake_enter.argtypes = [HANDLE]
DRIVER.fake_capturing.argtypes = [HANDLE]
DRIVER.fake_put.argtypes = [HANDLE, WORK, ctypes.c_void_p]


@pytest.fixture(autouse=True)
def balanced():
    """Every check leaves the thread's contexts as they were and nothing allocated."""
    gc.collect()
    before = DRIVER.fake_live(), DRIVER.fake_primaries(), DRIVER.fake_current()
    yield
    gc.collect()
    assert (DRIVER.fake_live(), DRIVER.fake_primaries(), DRIVER.fake_current()) == before


@pytest.fixture
def gpu():
    gpu = Gpu()
    yield gpu
    gpu.close()
    gpu.close()


def test_there_is_a_gpu(monkeypatch):
    assert no_gpu() is None
    monkeypatch.setenv("FAKE_NO_GPU", "1")
    assert no_gpu().endswith("none is visible (the driver lists no GPU)")


def test_a_gpu_that_is_not_there():
    for ordinal in (2, -1):
        with pytest.raises(UserError, match=f"there is no GPU {ordinal}; those visible here are 0 to 1"):
            Gpu(ordinal)


@pytest.mark.parametrize("ordinal", [0, 1])
def test_the_primary_context_where_none_is_current(ordinal):
    gpu = Gpu(ordinal)
    assert (gpu.context, gpu.target) == (PRIMARY + ordinal, f"sm8{9 - ordinal}")
    assert (DRIVER.fake_primaries(), DRIVER.fake_current()) == (1, 0)
    with gpu:
        assert DRIVER.fake_current() == gpu.context
    gpu.close()


def test_the_context_that_is_current():
    DRIVER.fake_enter(PYCUDA)
    gpu, other = Gpu(0), Gpu(1)  # the current one is of GPU 0
    assert (gpu.context, other.context) == (PYCUDA, PRIMARY + 1)
    assert DRIVER.fake_primaries() == 1
    with other, gpu:
        gpu.allocate(64)
        assert DRIVER.fake_current() == PYCUDA
    assert DRIVER.fake_current() == PYCUDA
    gpu.close()
    other.close()
    DRIVER.fake_leave()


def test_copies_and_times(gpu):
    with gpu:
        address, source, target = gpu.allocate(48), gpu.pinned((3, 4)), gpu.pinned((3, 4))
        assert address % 256 == 0
        assert gpu.allocate(0) == 0
        source[:] = np.arange(12).reshape(3, 4)
        begin = gpu.mark_time(gpu.stream)
        gpu.copy_in(address, source, gpu.stream)
        gpu.copy_out(target[:2], address, gpu.stream)
        end = gpu.mark_time(gpu.stream)
        gpu.stream.sync()
        np.testing.assert_array_equal(target[:2], source[:2])
        assert end - begin == 1


def test_streams_wait_for_each_other(gpu):
    with gpu:
        default, event = gpu.stream_of(LEGACY_STREAM), None
        for stream in (gpu.stream, default, gpu.stream_of(int(gpu.stream.handle))):
            event = stream.record(event)
            gpu.stream.wait(event)
            stream.wait(gpu.stream)
        assert gpu.stream_of(LEGACY_STREAM) is default


def test_a_graph_replays_on_another_stream(gpu):
    with gpu:
        address, source, target = gpu.allocate(16), gpu.pinned((4,)), gpu.pinned((4,))
        source[:], target[:] = 1, 0
        graph = gpu.record(lambda: gpu.copy_in(address, source, gpu.stream))
        for value in (2, 3):
            source[:] = value
            graph.launch(gpu.stream_of(LEGACY_STREAM))
            gpu.copy_out(target, address, gpu.stream)
            assert (target == value).all()
        graph.close()


def test_what_cannot_be_recorded_leaves_the_stream_usable(gpu):
    def refused():
        raise UserError("TensorRT cannot run the network")

    with gpu:
        address, source = gpu.allocate(16), gpu.pinned((4,))
        for work, message in (
            (gpu.stream.sync, r"cannot be recorded as a CUDA graph \(.*\): cuda_graph=False runs without"),
            (refused, "TensorRT cannot run the network"),
        ):
            with pytest.raises(UserError, match=message):
                gpu.record(work)
            assert not DRIVER.fake_capturing(int(gpu.stream.handle))
            gpu.record(lambda: gpu.copy_in(address, source, gpu.stream)).close()


def test_where_memory_and_streams_are_of(gpu):
    with gpu:
        address = gpu.allocate(512)
        assert gpu.place(address + 256) == (0, PRIMARY)
        assert gpu.place(256) is None
    DRIVER.fake_enter(PYCUDA)
    other = Gpu()
    with gpu, pytest.raises(UserError, match="the stream is of another CUDA context than the session"):
        gpu.stream_of(int(other.stream.handle))
    other.close()
    DRIVER.fake_leave()


def test_what_the_driver_refuses_is_one_line(gpu):
    with (
        gpu,
        pytest.raises(UserError, match="CUDA cannot give 1,073,741,824 bytes of the GPU's memory: CUDA_ERROR_OUT"),
    ):
        gpu.allocate(1 << 30)


# A whole session


KEPT = []  # callbacks that graphs may still call


class DriverStream:
    """A stream of the fake driver, as fake_gpu.py's TensorRT uses one."""

    context = None

    def __init__(self, handle: int):
        self.handle = handle

    @property
    def capture(self) -> object | None:
        return DRIVER.fake_capturing(self.handle) or None

    def put(self, name: str, work, reads, writes) -> None:
        callback = WORK(lambda _: work())
        KEPT.append(callback)
        assert DRIVER.fake_put(self.handle, callback, None) == 0


class DriverWorld:
    """What fake_gpu.py's TensorRT asks of a GPU, from the fake driver."""

    class Streams:
        def __getitem__(self, handle: int) -> DriverStream:
            return DriverStream(handle)

        def __contains__(self, handle: int) -> bool:
            return handle > 2

    streams = Streams()
    contexts = (None,)

    def check_current(self, context: object) -> None:
        assert DRIVER.fake_current()

    def find(self, address: int, size: int = 1) -> int:
        return address

    def floats(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape))
        return np.frombuffer((ctypes.c_float * size).from_address(address), np.float32).reshape(shape)


def session(rtx: bool = False, **options) -> Session:
    return Session(engine(DriverWorld(), rtx=rtx), **options)


@pytest.mark.parametrize("context", [0, PYCUDA])
@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("rtx", [True, False])
def test_a_session(context, cuda_graph, rtx):
    if context:
        DRIVER.fake_enter(context)
    with session(rtx, cuda_graph=cuda_graph) as run:
        for size in (3, 1, 3):
            batch = images(size)
            check(run.run(batch), batch)
        logits, timing = run.run_timed(batch)
        check(logits, batch)
        assert timing.device_ms > 0
        assert timing.host_ms > 0
        assert run.time_device(3).graph == cuda_graph
        device_arrays(run)
    if context:
        DRIVER.fake_leave()


def device_arrays(run: Session) -> None:
    """Arrays of a caller who shares the context, on a stream of theirs and without one."""
    world, batch = DriverWorld(), images(2)
    with run._gpu:
        caller = Gpu()  # in the session's context
    with caller:
        given, target = (
            DeviceArray(caller.allocate(int(np.prod(shape)) * 4), shape, None, None)
            for shape in ((2, *SHAPE), (2, len(run.classes)))
        )
    world.floats(given.address, given.shape)[:] = batch
    assert run.run_device(given, target, stream=caller.stream) is target
    check(world.floats(target.address, target.shape), batch)
    world.floats(run.images(2).address, given.shape)[:] = batch + 1
    for stream in (caller.stream, None, 0):
        found = run.run_device(run.images(2), stream=stream)
        check(world.floats(found.address, found.shape), batch + 1)
    with pytest.raises(UserError, match="images lies at 0x100000, which is no memory"):
        run.run_device(DeviceArray(1 << 20, given.shape, None, None))
    caller.close()


def test_a_session_that_cannot_be_made():
    file = engine(DriverWorld(), content=b"no engine")
    with pytest.raises(UserError, match=r"TensorRT cannot load net\.engine"):
        Session(file)
    file = engine(DriverWorld(), targets=("sm90",))
    with pytest.raises(UserError, match=r"is for sm90, and the GPU is sm89"):
        Session(file)


def test_a_session_that_nobody_has():
    run = session()
    run.run(images(1))
