"""What all tests share: offline, deterministic, and an independent definition of the noise."""

import gc
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"

import importlib.metadata
import importlib.util
import math

import interpreter
import numpy as np
import pytest
import torch
from hypothesis import is_hypothesis_test, settings

from zofo_kernels import unavailable_reason

for helper in (
    *("arranged", "least_squares", "simulation", "streamed_models", "toys"),
    *("trained_llama", "tuned_llama"),
):
    pytest.register_assert_rewrite(helper)

settings.register_profile("zofo", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("zofo")

CPU_BACKENDS = [name for name in ("reference", "cpu") if unavailable_reason(name) is None]
INTERPRET = "TRITON_INTERPRET"


def import_interpreted():
    """Make Triton's interpreter run our kernels, in this process for good; say whether it will.

    The variable is set for the import alone, so that elsewhere Triton is as users have it.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(INTERPRET, "1")
        try:
            import zofo_kernels.triton as kernels
        except ImportError:  # too old: what torch 2.6 and 2.7 pin
            return False
    if kernels.INTERPRETED:
        interpreter.hurry(importlib.import_module("zofo_kernels.triton_random"))
    return kernels.INTERPRETED


INTERPRETED = import_interpreted()
if INTERPRETED:
    CPU_BACKENDS.append("triton")


@pytest.fixture(scope="module")
def interpreted():
    """Triton's interpreter serves CPU tensors while a test that asks for this runs."""
    if not INTERPRETED:
        pytest.skip("Triton is not installed or too old, or compiles for the GPU that is here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(INTERPRET, "1")
        yield


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as where the tests run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _compiler_is_missing():
    """Whether torch's compiler cannot start, as with another Triton than that of its torch."""
    try:
        import torch._inductor.runtime.hints  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def _major(package):
    try:
        return int(importlib.metadata.version(package).split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


needs_compiler = pytest.mark.skipif(
    _compiler_is_missing() is not None,
    reason=f"torch.compile cannot start here: {_compiler_is_missing()}",
)
needs_transformers_5 = pytest.mark.skipif(
    _major("transformers") < 5,
    reason="transformers 5 saved the model's tokenizer, and earlier versions cannot read it",
)
needs_cpu_sharding = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason=f"FSDP2 of torch {torch.__version__} asks streams of the CPU for what they lack",
)


INTERPRETED_SHARE = 3
"""Triton's interpreter gets one in so many of the cases that Hypothesis makes."""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    """The interpreter is slow, and all backends get the same cases: it gets the first of them."""
    test = getattr(item, "obj", None)
    params = getattr(getattr(item, "callspec", None), "params", {})
    if not (INTERPRETED and params.get("backend") == "triton" and is_hypothesis_test(test)):
        yield
        return
    test = getattr(test, "__func__", test)
    whole = test._hypothesis_internal_use_settings
    fewer = max(math.ceil(whole.max_examples / INTERPRETED_SHARE), min(whole.max_examples, 5))
    test._hypothesis_internal_use_settings = settings(whole, max_examples=fewer)
    yield
    test._hypothesis_internal_use_settings = whole


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
    if item.get_closest_marker("nightly") and not os.environ.get("ZOFO_NIGHTLY"):
        pytest.skip("takes long: set ZOFO_NIGHTLY=1")


@pytest.fixture(scope="module", params=CPU_BACKENDS)
def backend(request):
    """Every backend that serves CPU tensors here."""
    if request.param == "triton":
        request.getfixturevalue("interpreted")
    return request.param


@pytest.fixture(autouse=True)
def modes():
    """A test leaves no torch-function mode behind: each would slow all later ones."""
    before = torch._C._len_torch_function_stack()
    yield
    after = torch._C._len_torch_function_stack()
    while torch._C._len_torch_function_stack() > before:
        torch._C._pop_torch_function_stack()
    assert after == before


@pytest.fixture(autouse=True)
def precision():
    """A test leaves no precision behind: transformers 4 keeps a Trainer's in the environment."""
    name = "ACCELERATE_MIXED_PRECISION"
    before = os.environ.get(name)
    yield
    os.environ.pop(name, None)
    if before is not None:
        os.environ[name] = before


@pytest.fixture
def threads():
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def seeded():
    """torch's global generator as after ``torch.manual_seed(0)``."""
    torch.manual_seed(0)


def each_of(values):
    """A fixture that is each of ``values`` in turn, to be bound to its name in a test module."""

    @pytest.fixture(params=values)
    def value(request):
        return request.param

    return value


BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.element_size()])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def weights(shape, dtype, seed=0, sigma=0.5):
    generator = torch.Generator().manual_seed(seed)
    return (sigma * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def philox(direction, index, stream, block):
    """Philox4x32-10 in numpy, written from the paper: uint64 blocks (n,) -> words (4, n)."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = direction.key()
    c0, c1 = block & low, block >> high
    c2, c3 = np.full_like(block, index), np.full_like(block, stream)
    for _ in range(10):
        p, q = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (q >> high) ^ c1 ^ np.uint64(k0), (p >> high) ^ c3 ^ np.uint64(k1)
        c1, c3 = q & low, p & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3])


def _positions(offset, count):
    return np.uint64(offset) + np.arange(count, dtype=np.uint64)


def _word(direction, index, stream, j, per_word):
    words = philox(direction, index, stream, j // np.uint64(4 * per_word))
    return words[j // np.uint64(per_word) % np.uint64(4), np.arange(len(j))]


def element_noise(direction, index, offset, count, stream=0):
    """z of elements offset ... of parameter ``index``, in float64: the definition, by element.

    Full noise; factors of low rank are streams 3 and 4.
    """
    j = _positions(offset, count)
    if direction.distribution == "rademacher":
        bit = _word(direction, index, stream, j, 32) >> (j % np.uint64(32)) & np.uint64(1)
        return 1.0 - 2.0 * bit
    word = _word(direction, index, stream, j, 2)
    k, a = word & np.uint64(2**23 - 1), (word >> np.uint64(23)).astype(np.int64)
    radius = np.sqrt(-2 * np.log((2.0 * k + 1) / 2**24))
    angle = (np.where(a < 256, a, a - 512) + 0.5) * np.pi / 256
    return radius * np.where(j % np.uint64(2) == 0, np.cos(angle), np.sin(angle))


def element_bits(direction, index, offset, count, stream=1):
    """The 16 rounding bits of elements offset ... of parameter ``index``: int64.

    Of updates; those of shifts are stream 2.
    """
    j = _positions(offset, count)
    word = _word(direction, index, stream, j, 2) >> (np.uint64(16) * (j % np.uint64(2)))
    return (word & np.uint64(0xFFFF)).astype(np.int64)


def spacing(size, dtype):
    """Of the dtype's numbers from ``size`` (float64, numpy) on, away from 0."""
    bits, lowest = {torch.bfloat16: (7, -133), torch.float16: (10, -24)}[dtype]
    exponent = np.where(size > 0, np.frexp(size)[1] - 1, lowest)
    return np.ldexp(1.0, np.maximum(exponent - bits, lowest))


def coarse(w, shift):
    """Which 16-bit weights a shift of noise version 2 rounds stochastically: bool, numpy."""
    finest = {"gaussian": 1, "rademacher": 0.5}[shift.direction.distribution]
    return spacing(w.abs().double().numpy(), w.dtype) > finest * abs(shift.scale)


def shifted(w, shift, index=0, offset=0):
    """w + scale z, rounded: the definition, by element, for 16-bit weights (n,)."""
    z = torch.from_numpy(element_noise(shift.direction, index, offset, w.numel())).float()
    x = w.float() + torch.tensor(shift.scale) * z
    if shift.direction.version == 1 or shift.scale == 0:
        return x.to(w.dtype)
    size, was = x.abs().double().numpy(), w.abs().double().numpy()
    unit, random = spacing(size, w.dtype), element_bits(shift.direction, index, offset, len(w), 2)
    random = random if shift.scale > 0 else 65535 - random
    step = np.maximum(unit, spacing(was, w.dtype)) if shift.back else unit
    if w.dtype == torch.float16:  # as many bits as fp32 has more than fp16
        drop = np.where(step > unit, 2, np.where(size < 2.0**-14, 0, 3))
        random = random >> drop << drop
    else:
        random = random + 0.5 * (step > unit)
    with np.errstate(invalid="ignore"):  # of infinities
        whole = np.floor(size / step)
        up = size / step - whole + random / 65536 >= 1
    rounded = np.copysign((whole + up) * step, x.double().numpy())
    reachable = np.abs(rounded) <= torch.finfo(w.dtype).max
    chosen = np.where(coarse(w, shift) & reachable, rounded, x.to(w.dtype).double().numpy())
    return torch.from_numpy(chosen).to(w.dtype)


@pytest.fixture(scope="session", name="element_noise")
def _element_noise():
    return element_noise


@pytest.fixture(scope="session", name="element_bits")
def _element_bits():
    return element_bits


@pytest.fixture(scope="session", name="philox")
def _philox():
    return philox


def pytest_collection_finish(session):
    """What was imported stays: each collection of garbage would walk it, for half a second."""
    gc.collect()
    gc.freeze()
