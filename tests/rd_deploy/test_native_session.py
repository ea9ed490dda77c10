"""The Python wrapper of the compiled engine: what comes back, what is refused, memory, threads, freeing."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from chains import basics, bottlenecks, images_for, reference

from rd_deploy.common import UserError
from rd_deploy.export.native import to_rdp
from rd_deploy.native import (
    Flag,
    Network,
    Session,
    Unsupported,
    aligned_empty,
    available_isas,
    measure_product,
    measure_read,
)

CHAIN = bottlenecks(shortcuts=True)


@pytest.fixture(scope="module")
def data() -> bytes:
    return to_rdp(CHAIN)


@pytest.fixture
def network(data) -> Network:
    return Network.from_bytes(data)


def test_a_network_says_what_it_is(network):
    info = network.info
    assert (info.name, info.precision, info.classes, info.steps) == ("test", "fp32", 7, len(CHAIN.steps))
    assert (info.channels, info.height, info.width) == CHAIN.input_shape
    assert network.classes == CHAIN.classes
    assert network.preprocessing == CHAIN.preprocessing
    assert network.description["weights_sha256"] == CHAIN.sha256()
    assert info.weight_bytes >= 4 * CHAIN.parameters()


def test_a_file_and_its_bytes_are_the_same_network(network, data, tmp_path):
    path = tmp_path / "net ü.rdp"
    path.write_bytes(data)
    images = images_for(CHAIN, 1)
    expected = network.plan(1, 1).context().run(images)
    for other in (Network.load(path), Network.load(str(path)), Network.from_bytes(bytearray(data))):
        assert other.info == network.info
        np.testing.assert_array_equal(other.plan(1, 1).context().run(images), expected)


def test_a_plan_says_what_it_does(network):
    plan = network.plan(batch=2, threads=3, isa="portable", flags=Flag.UNFUSED | Flag.NO_WINOGRAD)
    info, steps = plan.info, plan.steps
    assert (info.batch, info.threads, info.isa, info.classes) == (2, 3, "portable", 7)
    assert (info.channels, info.height, info.width) == CHAIN.input_shape
    assert len(steps) == info.steps == len(CHAIN.steps)
    assert [step.name for step in steps] == [step.name for step in CHAIN.steps]
    assert info.macs == CHAIN.macs()
    assert sum(step.macs for step in steps) == 2 * CHAIN.macs()
    assert all(step.flops >= 2 * step.macs for step in steps)  # padded channels are computed too
    assert info.arena_bytes == info.feature_map_bytes + info.scratch_bytes + info.alignment_bytes
    assert info.packed_bytes == 0
    assert max(step.live_bytes for step in steps) <= info.arena_bytes


def test_defaults_are_the_best_here(network, monkeypatch):
    monkeypatch.delenv("RD_ISA", raising=False)
    monkeypatch.setattr("rd_deploy.native.session.available_threads", lambda: 2)
    info = network.plan().info
    assert (info.batch, info.threads) == (1, 2)
    assert info.isa == next(isa for isa in available_isas() if "bf16" not in isa)


def test_the_environment_names_the_instruction_set(network, monkeypatch):
    monkeypatch.setenv("RD_ISA", "portable")
    assert network.plan(1, 1).info.isa == "portable"
    monkeypatch.setenv("RD_ISA", "mmx")
    with pytest.raises(Unsupported, match=r"unknown instruction set 'mmx': choose one of .*portable"):
        network.plan(1, 1)


def test_images_are_read_where_they_lie_and_logits_written_where_told(network):
    context = network.plan(2, 1).context()
    images = images_for(CHAIN, 2)
    before, out = images.copy(), np.full((3, 7), np.nan, np.float32)
    assert context._images(images) is images
    result = context.run(images, out=out[1:])
    assert np.shares_memory(result, out)
    assert np.isnan(out[0]).all()
    np.testing.assert_array_equal(images, before)
    np.testing.assert_allclose(out[1:], reference(CHAIN, images), atol=1e-3)


def test_other_layouts_and_precisions_are_copied(network):
    context = network.plan(2, 1).context()
    images = images_for(CHAIN, 2)
    expected = context.run(images)
    shifted = np.frombuffer(b"\0" + images.tobytes(), np.uint8)[1:].view(np.float32).reshape(images.shape)
    others = [images.astype(np.float64), images.astype(">f4"), np.asfortranarray(images), images[::-1][::-1], shifted]
    for other in others:
        np.testing.assert_array_equal(context.run(other), expected)


def test_a_run_leaves_earlier_logits_alone(network):
    context = network.plan(1, 1).context()
    images = images_for(CHAIN, 1)
    first = context.run(images)
    kept = first.copy()
    assert not np.array_equal(context.run(-images), kept)
    np.testing.assert_array_equal(first, kept)


def test_a_profile_has_the_same_logits_and_a_time_per_step(network):
    plan = network.plan(1, 2)
    context, images = plan.context(), images_for(CHAIN, 1)
    logits, seconds = context.profile(images)
    np.testing.assert_array_equal(logits, context.run(images))
    assert seconds.shape == (len(plan.steps),)
    assert (seconds >= 0).all()
    assert seconds.sum() > 0


def test_the_callers_arena_is_used_and_need_not_be_clean(network):
    plan, images = network.plan(1, 2), images_for(CHAIN, 1)
    arena = aligned_empty(plan.info.arena_bytes)
    assert arena.ctypes.data % 64 == 0
    arena[:] = 0xFF  # NaN in every precision
    np.testing.assert_array_equal(plan.context(arena).run(images), plan.context().run(images))
    assert (arena != 0xFF).any()


def test_other_image_sizes_than_the_files(network):
    context = network.plan(1, 1, image_size=(24, 31)).context()
    images = np.random.default_rng(0).standard_normal((1, 3, 24, 31)).astype(np.float32)
    np.testing.assert_allclose(context.run(images), reference(CHAIN, images), atol=1e-3)


def test_objects_may_be_let_go_in_any_order(data):
    images = images_for(CHAIN, 1)
    expected = Network.from_bytes(data).plan(1, 1).context().run(images)
    context = Network.from_bytes(data).plan(1, 2).context()
    gc.collect()
    np.testing.assert_array_equal(context.run(images), expected)
    network = Network.from_bytes(data)
    plans = [network.plan(1, 2) for _ in range(3)]
    contexts = [plan.context(aligned_empty(plan.info.arena_bytes)) for plan in plans]
    del network, plans[1]
    gc.collect()
    for context in contexts:
        np.testing.assert_array_equal(context.run(images), expected)


def test_contexts_run_at_the_same_time_and_calls_of_one_wait(network):
    plan = network.plan(1, 2)
    contexts = [plan.context(), plan.context()]
    images = [images_for(CHAIN, 1, seed) for seed in range(4)]
    expected = [contexts[0].run(x) for x in images]
    wrong = []

    def call(number: int) -> None:
        for _ in range(20):
            logits = contexts[number % 2].run(images[number])
            if not np.array_equal(logits, expected[number]):
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_context_says_that_it_did_not_survive_a_fork(network):
    """Its threads are gone in the child: neither a call nor freeing may wait for them."""
    contexts, images = [network.plan(1, 2).context()], images_for(CHAIN, 1)
    expected = contexts[0].run(images)

    def child(pipe) -> None:
        try:
            contexts[0].run(images)
        except UserError as error:
            pipe.send(str(error))
        contexts.clear()
        gc.collect()
        pipe.send(network.plan(1, 2).context().run(images))

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    assert here.poll(60)
    assert "before the process forked" in here.recv()
    assert here.poll(60)
    np.testing.assert_array_equal(here.recv(), expected)
    process.join(60)
    assert process.exitcode == 0


DAEMONS = """
import os, sys, threading
import numpy as np
from rd_deploy.native import Network, aligned_empty

with open(sys.argv[1], "rb") as file:
    network = Network.from_bytes(file.read())
plan = network.plan(8, 2)
running = threading.Barrier(3)

def run(context):
    images = np.zeros(context.input_shape, np.float32)
    context.run(images)
    running.wait()
    while True:
        context.run(images)

class Arena(np.ndarray):
    def __del__(self, write=os.write):
        write(2, b"freed while it was used")

for arena in (None, aligned_empty(plan.info.arena_bytes).view(Arena)):
    threading.Thread(target=run, args=(plan.context(arena),), daemon=True).start()
del arena
running.wait()
"""


def test_the_process_may_end_while_daemon_threads_run(tmp_path):
    """Nothing of the engine's is freed below them, the file's memory and the caller's arena included."""
    path = tmp_path / "net.rdp"
    path.write_bytes(to_rdp(bottlenecks(width=32, size=(64, 64))))
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", DAEMONS, str(path)], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")


# --- Session


def test_a_session_takes_any_number_of_images(data, tmp_path):
    path = tmp_path / "net.rdp"
    path.write_bytes(data)
    images = images_for(CHAIN, 5)
    expected = reference(CHAIN, images)
    for session in (Session(path, batch=2, threads=1), Session(str(path)), Session(data, batch=4, isa="portable")):
        for count in (5, 4, 3, 1):
            np.testing.assert_allclose(session.run(images[:count]), expected[:count], atol=1e-3)
    assert (session.info.batch, session.info.isa) == (4, "portable")
    assert (session.classes, session.preprocessing) == (CHAIN.classes, CHAIN.preprocessing)
    for wrong in (images[:0], images[0], images[:3, :1], images[:3, :, :1, :1], np.float32(1)):
        with pytest.raises(UserError, match=r"images must be \(N, 3, 20, 20\), N at least 1, not \("):
            session.run(wrong)
    with pytest.raises(UserError, match="not uint8"):
        session.run(np.zeros((3, 3, 20, 20), np.uint8))


def test_from_photos_to_logits(data):
    session = Session(data)
    photos = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
    assert session.run(session.preprocessing.apply(photos)).shape == (2, 7)


# --- what is refused


def test_files_that_are_not_there_or_not_whole(data, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.rdp"):
        Network.load(tmp_path / "nowhere.rdp")
    with pytest.raises(UserError, match="zero character"):
        Network.load("net\0.rdp")
    path = tmp_path / "cut.rdp"
    path.write_bytes(data[:-64])
    for make in (lambda: Network.load(path), lambda: Network.from_bytes(data[:-64]), lambda: Network.from_bytes(b"")):
        with pytest.raises(UserError) as error:
            make()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": 4097}, "batch"),
        ({"batch": -1}, "batch -1 is out of range"),
        ({"batch": (1 << 32) + 1}, "batch 4294967297 is out of range"),
        ({"threads": 0}, "threads"),
        ({"threads": 1025}, "threads"),
        ({"image_size": (2, 1 << 20)}, "height and width"),
        ({"isa": "sse9"}, "unknown instruction set 'sse9'"),
    ],
)
def test_plans_that_cannot_be(network, options, said):
    with pytest.raises(UserError, match=said) as error:
        network.plan(**{"batch": 1, "threads": 1} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("isa", "precision"), [("avx512_bf16", "fp32"), ("amx_bf16", "fp32"), ("amx_bf16x2", "bf16")])
def test_an_instruction_set_runs_no_precision_that_it_lacks(isa, precision):
    if isa not in available_isas():
        pytest.skip(f"this CPU or compiler has no {isa}")
    with pytest.raises(Unsupported, match=f"{isa} has no {precision} kernels"):
        Network.from_bytes(to_rdp(CHAIN, precision)).plan(1, 1, isa=isa)
    with pytest.raises(Unsupported, match=f"{isa} has no {precision} kernels"):
        measure_product(precision, 1, isa)


def test_two_bf16_for_each_number_are_only_taken_by_name(network, monkeypatch):
    if "amx_bf16x2" not in available_isas():
        pytest.skip("this CPU or compiler has no amx_bf16x2")
    monkeypatch.delenv("RD_ISA", raising=False)
    assert network.plan(1, 1).info.isa != "amx_bf16x2"
    monkeypatch.setenv("RD_ISA", "amx_bf16x2")
    assert network.plan(1, 1).info.isa == "amx_bf16x2"
    assert measure_product("fp32", 1) > 0


def test_images_and_outputs_that_do_not_fit(network):
    context, images = network.plan(2, 1).context(), images_for(CHAIN, 2)
    for wrong in (images[:1], images[0], images[:, :, :10]):
        with pytest.raises(UserError, match=r"images must be float32 \(2, 3, 20, 20\)"):
            context.run(wrong)
    with pytest.raises(UserError, match=r"not uint8 .*see Network.preprocessing"):
        context.run(np.zeros((2, 3, 20, 20), np.uint8))
    locked = np.empty((2, 7), np.float32)
    locked.flags.writeable = False
    for out in (np.empty((1, 7), np.float32), np.empty((2, 7)), np.empty((7, 2), np.float32).T, locked):
        with pytest.raises(UserError, match="out must be a contiguous, writable float32"):
            context.run(images, out=out)


def test_arenas_that_do_not_fit(network):
    plan = network.plan(1, 1)
    size = plan.info.arena_bytes
    with pytest.raises(UserError, match="arena"):
        plan.context(aligned_empty(size - 1))
    with pytest.raises(UserError, match="align"):
        plan.context(aligned_empty(size + 64)[4:])
    locked = aligned_empty(size)
    locked.flags.writeable = False
    for arena in (locked, aligned_empty(2 * size)[::2]):
        with pytest.raises(UserError, match="contiguous and can be written"):
            plan.context(arena)


def test_limits_of_the_machine():
    assert measure_product("fp32", 1, "portable") > 1e8
    assert measure_read(1 << 16, 2) > 1e8
    with pytest.raises(UserError, match="precision"):
        measure_product("int8", 1)
    with pytest.raises(UserError, match="threads"):
        measure_read(1 << 16, 0)
    with pytest.raises(Unsupported, match="unknown instruction set"):
        measure_product("fp32", 1, "sse9")


def test_a_network_without_shortcuts_for_small_images():
    chain = basics(channels=1)
    session = Session(to_rdp(chain), batch=3, threads=2)
    images = images_for(chain, 3)
    np.testing.assert_allclose(session.run(images), reference(chain, images), atol=1e-3)
