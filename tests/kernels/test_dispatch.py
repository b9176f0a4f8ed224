"""Which backend serves a tensor, and passes under threads, forks and Ctrl-C."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import zofo_kernels
from zofo_kernels import (
    Direction,
    Shift,
    backend_for,
    dispatch,
    interrupt,
    interruptible,
    noise,
    perturb_,
    reference,
    unavailable_reason,
    uninterrupted,
    update_,
)

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
DIRECTION = Direction(5, 3)
BIG = 150_000  # elements: several threads' worth


@pytest.fixture
def fresh_dispatch():
    """Availability is looked up once a process: forget it before and after."""

    def forget():
        dispatch._import_error.cache_clear()
        dispatch._warn_slow.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def no_numba(monkeypatch, fresh_dispatch):
    for module in ("cpu", "cpu_kernels", "cpu_random"):
        monkeypatch.delitem(sys.modules, f"zofo_kernels.{module}", raising=False)
        monkeypatch.delattr(zofo_kernels, module, raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)


@pytest.fixture
def no_triton(monkeypatch, fresh_dispatch):
    monkeypatch.setitem(sys.modules, "zofo_kernels.triton", None)


def name(module):
    return module.__name__.removeprefix("zofo_kernels.")


def test_auto_takes_numba_on_the_cpu():
    pytest.importorskip("numba")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert name(backend_for(CPU)) == "cpu"
        assert name(backend_for(CPU, "auto")) == "cpu"
    assert unavailable_reason("cpu") is None
    z = noise((1000,), DIRECTION)
    assert torch.equal(z, noise((1000,), DIRECTION, backend="cpu"))
    assert not torch.equal(z, noise((1000,), DIRECTION, backend="reference"))


def test_reference_serves_any_device():
    assert unavailable_reason("reference") is None
    for device in (CPU, CUDA, META, torch.device("mps")):
        assert backend_for(device, "reference") is reference


def test_auto_takes_the_reference_elsewhere_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_for(META) is reference
        assert backend_for(torch.device("mps")) is reference


NO_FOLDER = """
import warnings, numpy, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import zofo_kernels as kernels
    print(kernels.backend_for(torch.device("cpu")).__name__)
    from zofo_kernels.cpu_random import philox  # which compiles faster than a pass
    words = numpy.zeros(4, numpy.uint32)
    philox(words, 1, numpy.uint64(0), 0, 0, 0, 0)
print(words.tolist())
print(*[str(one.message) for one in caught if "numba" in str(one.message)], sep="\\n")
"""


def test_where_no_folder_can_be_written_numba_compiles_for_the_process(tmp_path):
    """Where a folder should be, a file is: root may write to any folder."""
    pytest.importorskip("numba")
    package = Path(zofo_kernels.__file__).parent
    skipped = shutil.ignore_patterns("__pycache__")
    copied = shutil.copytree(package, tmp_path / package.name, ignore=skipped)
    (copied / "__pycache__").touch()
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"), os.devnull)
    environment = {**os.environ, **nowhere, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", NO_FOLDER], capture_output=True, text=True, env=environment
    )
    backend, words, *warned = done.stdout.splitlines()
    assert backend == "zofo_kernels.cpu", done.stderr
    assert words == str([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])  # known answers
    (warning,) = warned
    assert "NUMBA_CACHE_DIR" in warning


@pytest.mark.usefixtures("no_numba")
def test_without_numba_the_reference_serves_after_one_warning():
    w = torch.zeros(9)
    with pytest.warns(UserWarning, match="slow reference backend serves 'cpu'.*numba") as caught:
        perturb_([w], DIRECTION, 1.0)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perturb_([w], DIRECTION, 1.0)
        z = noise((9,), DIRECTION)
        update_([w], [DIRECTION], torch.ones(1), 2.0)
    assert torch.equal(z, noise((9,), DIRECTION, backend="reference"))
    assert torch.equal(w, torch.zeros(9))


@pytest.mark.usefixtures("no_numba")
def test_without_numba_backend_cpu_says_why():
    w = torch.zeros(9)
    with pytest.raises(RuntimeError, match=r"backend='cpu' is not available: numba .*pip install"):
        perturb_([w], DIRECTION, 1.0, backend="cpu")
    assert w.eq(0).all()


@pytest.mark.usefixtures("no_triton")
def test_without_triton():
    w = torch.zeros(9)
    with pytest.raises(RuntimeError, match=r"backend='triton' is not available: .* imported"):
        perturb_([w], DIRECTION, 1.0, backend="triton")
    assert w.eq(0).all()
    with pytest.warns(UserWarning, match="slow reference backend serves 'cuda'.*Triton"):
        assert backend_for(CUDA) is reference


def test_triton_without_a_gpu(monkeypatch, fresh_dispatch):
    stub = types.ModuleType("zofo_kernels.triton")
    monkeypatch.setitem(sys.modules, "zofo_kernels.triton", stub)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"backend='triton' is not available: .*no CUDA device"):
        backend_for(CUDA, "triton")


def test_triton_serves_cuda_only(monkeypatch, fresh_dispatch):
    stub = types.ModuleType("zofo_kernels.triton")
    monkeypatch.setitem(sys.modules, "zofo_kernels.triton", stub)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend_for(CUDA) is stub
    assert backend_for(CUDA, "triton") is stub
    with pytest.raises(ValueError, match=r"backend='triton' serves cuda tensors, got .* cpu"):
        backend_for(CPU, "triton")


def test_backend_cpu_serves_the_cpu_only():
    pytest.importorskip("numba")
    for device in (CUDA, META):
        with pytest.raises(ValueError, match=f"backend='cpu' serves cpu tensors, got .* {device}"):
            backend_for(device, "cpu")


def test_unknown_backends():
    for backend in ("numba", "", "CPU", None):
        with pytest.raises(ValueError, match=f"backend must be one of .*'reference'.*{backend!r}"):
            backend_for(CPU, backend)


def test_meta_tensors_are_refused(backend):
    w, meta = torch.zeros(3), torch.zeros(3, device="meta")
    for call in (
        lambda: perturb_([w, meta], DIRECTION, 1.0, backend=backend),
        lambda: update_([w, meta], [DIRECTION], torch.ones(1), 1.0, backend=backend),
    ):
        with pytest.raises(ValueError, match=r"tensors\[1\] must hold data.*meta"):
            call()
    assert w.eq(0).all()


# Threads and processes.


def test_concurrent_calls(backend, threads):
    if backend == "triton":
        pytest.skip("Triton's interpreter serves one thread at a time")
    threads(2)
    directions = [Direction(1, step) for step in range(6)]
    size = BIG if backend == "cpu" else 5000
    expected = [torch.zeros(size) for _ in range(6)]
    for w, direction in zip(expected, directions, strict=True):
        perturb_([w], direction, 1.0, backend=backend)

    start = threading.Barrier(6)

    def run(direction):
        start.wait()
        wrong = 0
        for _ in range(10):
            w = torch.zeros(size)
            perturb_([w], direction, 1.0, backend=backend)
            expected_here = expected[directions.index(direction)]
            wrong += not torch.equal(w, expected_here)
        return wrong

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(run, directions)) == 0


def test_concurrent_calls_while_the_pool_grows(threads):
    """Torch's thread count may rise between passes, and the pool with it."""
    expected = torch.zeros(BIG)
    perturb_([expected], DIRECTION, 1.0)

    def run(count):
        torch.set_num_threads(count)
        w = torch.zeros(BIG)
        perturb_([w], DIRECTION, 1.0)
        return torch.equal(w, expected)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, [2, 3, 4, 2, 4, 3] * 4))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_perturb(threads):
    """With numba: the reference uses torch's own threads, which do not survive a fork."""
    pytest.importorskip("numba")
    threads(3)
    expected, w = torch.zeros(BIG), torch.zeros(BIG)
    perturb_([expected], DIRECTION, 1.0)  # and so the parent has a pool
    child = os.fork()
    if child == 0:
        # Nothing but the pass and a comparison in numpy, and none of the parent's clean-up.
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            perturb_([w], DIRECTION, 1.0)
            status = 0 if (w.numpy() == expected.numpy()).all() else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), "the child hung"
    assert os.WEXITSTATUS(status) == 0
    perturb_([w], DIRECTION, 1.0)
    assert torch.equal(w, expected)


# Ctrl-C.


@pytest.fixture
def ctrl_c():
    """Send SIGINT from another thread, with Python's own handler in place."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def send():
        sender = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
        sender.start()
        sender.join()

    yield send
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("operation", ["perturb", "update"])
def test_ctrl_c_waits_for_the_whole_pass(backend, operation, monkeypatch, threads, ctrl_c):
    """SIGINT arrives when the pass has begun; every tensor has had its share when it ends."""
    threads(2)
    # Where each backend is in Python in the midst of a pass: reference at each chunk, cpu at
    # each dtype, triton at each launch.
    module = backend_for(CPU, backend)
    places = {"cpu": "_in_threads", "reference": "direction_values", "triton": "_start"}
    place = places[backend]
    original, calls = getattr(module, place), []

    def interrupted(*args):
        calls.append(place)
        if len(calls) == 1:
            ctrl_c()
        return original(*args)

    def run(tensors):
        if operation == "perturb":
            perturb_(tensors, DIRECTION, 0.5, backend=backend)
        else:
            shift = Shift(DIRECTION, 0.5)
            update_(tensors, [DIRECTION], torch.ones(1), 0.1, recover=shift, backend=backend)

    def make():
        sizes = (300, 20) if backend == "triton" else (2 * reference.CHUNK, BIG)
        wide, narrow = torch.zeros(sizes[0]), torch.zeros(sizes[1], dtype=torch.bfloat16)
        return [wide, narrow, torch.zeros(40, 30).t()]

    expected, tensors = make(), make()
    run(expected)
    monkeypatch.setattr(module, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tensors)
    assert len(calls) > 1
    for w, whole in zip(tensors, expected, strict=True):
        assert torch.equal(w, whole)
        assert w._version > 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_any_time_leaves_all_or_nothing_done(backend, ctrl_c):
    size = {"cpu": 20_000_000, "reference": 2_000_000, "triton": 60_000}[backend]
    w = torch.zeros(size)
    timer = threading.Timer(0.05, ctrl_c)  # most likely during the call, but any time will do

    def run():
        timer.start()
        perturb_([w], DIRECTION, 1.0, backend=backend)
        timer.join()

    with pytest.raises(KeyboardInterrupt):
        run()
    expected = noise((size,), DIRECTION, backend=backend)
    assert torch.equal(w, expected) or w.eq(0).all()


def test_uninterrupted_nests(ctrl_c):
    reached = []

    def run():
        with uninterrupted():
            with uninterrupted():
                ctrl_c()
                reached.append("inside")
            reached.append("after the inner block")
            with uninterrupted():
                ctrl_c()
            reached.append("after the second")
        reached.append("outside")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached == ["inside", "after the inner block", "after the second"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_uninterrupted_with_an_error(ctrl_c):
    def run(send):
        with uninterrupted():
            send()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(lambda: None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt) as caught:
        run(ctrl_c)
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_uninterrupted_passes_on_to_other_handlers(ctrl_c):
    seen = []

    def handler(signum, frame):
        seen.append(signum)

    signal.signal(signal.SIGINT, handler)
    with uninterrupted():
        ctrl_c()
        assert seen == []
    assert seen == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_uninterrupted_outside_the_main_thread():
    before = signal.getsignal(signal.SIGINT)

    def run():
        with uninterrupted():
            return signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result() is before


class Stop(Exception):
    pass


@pytest.fixture
def raising():
    """SIGTERM and SIGALRM have handlers that raise; those of before come back."""

    def stop(number, frame):
        raise Stop(number)

    numbers = (signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.signal(number, stop) for number in numbers}
    yield dict.fromkeys(numbers, stop)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_every_signal_with_a_handler_waits(raising, ctrl_c):
    def run():
        with uninterrupted():
            for number in raising:
                signal.raise_signal(number)
                signal.raise_signal(number)
            ctrl_c()
            reached.append("end")

    reached, handlers = [], {number: signal.getsignal(number) for number in signal.valid_signals()}
    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    assert reached == ["end"]
    others, error = [], caught.value
    while error := error.__context__:
        others.append(error.args[0])
    assert others == [signal.SIGALRM, signal.SIGTERM]  # each was handled, and once
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers


def test_signals_come_through_where_code_of_others_runs(raising):
    reached = []

    def waiting():
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            reached.append("held back")
            with interruptible():
                reached.append("never")

    def coming():
        with interruptible():
            assert signal.getsignal(signal.SIGTERM) is raising[signal.SIGTERM]
            signal.raise_signal(signal.SIGTERM)
            reached.append("never")

    def inner():
        with interruptible(), uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            reached.append("a block of its own")

    with pytest.raises(Stop):
        waiting()
    with uninterrupted():
        for run in (coming, inner):
            with pytest.raises(Stop):
                run()
            assert signal.getsignal(signal.SIGTERM) is not raising[signal.SIGTERM]
    assert reached == ["held back", "a block of its own"]
    assert signal.getsignal(signal.SIGTERM) is raising[signal.SIGTERM]


def test_a_block_that_ends_too_late_holds_nothing_back(raising):
    """A handler that raises as contextlib starts to end a block leaves that to the collector."""
    blocks = [interruptible()]

    def run():
        with uninterrupted():
            blocks[0].__enter__()
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stop):
        run()
    blocks.clear()
    gc.collect()
    assert signal.getsignal(signal.SIGTERM) is raising[signal.SIGTERM]
    with uninterrupted():  # and holds back as before
        assert signal.getsignal(signal.SIGTERM) is not raising[signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is raising[signal.SIGTERM]


def test_a_handler_that_is_set_where_signals_come_through_stays(raising):
    seen = []
    with uninterrupted():
        with interruptible():
            signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        signal.raise_signal(signal.SIGTERM)
        assert seen == []
    assert seen == [signal.SIGTERM]


def test_a_signal_at_any_line_leaves_all_handlers(raising):
    """While signals are being held back, and while they are released."""
    passed = place = stopped = 0

    def trace(frame, event, argument):
        nonlocal passed
        if frame.f_code.co_filename != interrupt.__file__:
            return None
        passed += event == "line"
        if passed == place and event == "line":
            signal.raise_signal(signal.SIGALRM)
        return trace

    before = sys.gettrace()
    while passed >= place:
        place, passed, reached = place + 1, 0, False
        sys.settrace(trace)
        try:
            with uninterrupted():
                signal.raise_signal(signal.SIGTERM)
                reached = True
        except Stop:
            stopped += 1
        finally:
            sys.settrace(before)
        assert {number: signal.getsignal(number) for number in raising} == raising, place
        with uninterrupted():  # and the next block holds back
            assert signal.getsignal(signal.SIGALRM) is not raising[signal.SIGALRM], place
        assert {number: signal.getsignal(number) for number in raising} == raising, place
    assert stopped == place
    assert place > 100
    assert reached
