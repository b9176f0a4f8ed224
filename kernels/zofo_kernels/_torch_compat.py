"""All that this project uses of torch's private API, in one place.

Each name says what is asked; how torch answers may change with its version.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import TreeSpec as TreeSpec
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_unflatten as tree_unflatten

_Function = TypeVar("_Function", bound=Callable[..., Any])

SET_GRAD_ENABLED: Callable[..., Any] = torch._C._set_grad_enabled
"""What ``torch.set_grad_enabled`` and its like call; a torch-function mode sees this call."""
READ_GRAD: Any = vars(torch._C.TensorBase)["grad"].__get__
"""What a torch-function mode sees where ``tensor.grad`` is read."""
READ_NUMBER: Any = torch.ops.aten._local_scalar_dense.default
"""The operation by which an element becomes a Python number."""
CPU_ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
GROUPED_PRODUCT: Any = getattr(torch.ops.aten, "_grouped_mm", None)
"""Products of several matrices at once, as of experts; None where torch has no such operation."""


@functools.cache
def cpu_attention_takes_groups() -> bool:
    """Whether fused attention on the CPU takes fewer heads of keys than of queries.

    Older torch takes such attention apart.
    """
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with without_torch_functions(), _disable_current_modes(), sdpa_kernel(kernels):  # type: ignore[no-untyped-call]
        query, key = (torch.empty(1, heads, 1, 8, device="cpu") for heads in (2, 1))
        choice = torch._fused_sdp_choice(query, key, key, enable_gqa=True)
    return bool(choice == SDPBackend.FLASH_ATTENTION.value)


def in_functorch() -> bool:
    """Whether a functorch transform (``torch.func.grad``, ``vmap``) is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def without_functorch() -> AbstractContextManager[Any]:
    """New tensors in the block are plain ones, even inside a functorch transform."""
    if not in_functorch():
        return nullcontext()
    block: AbstractContextManager[Any] = torch._C._DisableFuncTorch()
    return block


_SHOWN_BY_TORCH = torch.__version__ >= "2.11"  # a comparison costs more than the question may


class _Replaced:
    """A function of a module is another one while blocks last, which may be of several threads.

    Args:
        owner, name: where it is; a torch that has no such function is left as it is.
        wrap: makes the other one of it.
    """

    def __init__(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        self._owner, self._name, self._wrap = owner, name, wrap
        self._lock, self._blocks = threading.Lock(), 0
        self._original: Any = None

    @contextmanager
    def block(self) -> Generator[None, None, None]:
        if not hasattr(self._owner, self._name):
            yield
            return
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._original = getattr(self._owner, self._name)
                setattr(self._owner, self._name, self._wrap(self._original))
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if not self._blocks:
                    setattr(self._owner, self._name, self._original)


def _sparing(maybe_set: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor, Tensor], None]:
    def spare(dest: Tensor, src: Tensor) -> None:
        if dest is not src:
            maybe_set(dest, src)

    return spare


_spared_parametrizing = _Replaced(parametrize, "_maybe_set", _sparing)


def unwritten_by_parametrizing() -> AbstractContextManager[None]:
    """In the block, making a parametrization that stores the parameter as it is writes nothing.

    torch sets the parameter to itself there, which raises its version like any other write. peft
    makes one in each forward of an adapter of bare parameters, such as those of experts.
    """
    return _spared_parametrizing.block()


def _off_on_meta(autocast: Any) -> Callable[..., Any]:
    @functools.wraps(autocast, updated=())
    def made(device_type: str, *args: Any, **kwargs: Any) -> Any:
        if device_type == "meta" and kwargs.get("enabled") is False:
            return nullcontext()
        return autocast(device_type, *args, **kwargs)

    return made


_autocast_off_on_meta = _Replaced(torch, "autocast", _off_on_meta)


def autocast_off_on_meta() -> AbstractContextManager[None]:
    """In the block, ``torch.autocast("meta", enabled=False)`` does nothing; else torch raises.

    Models of transformers 4 turn autocast off around rotary positions, on whichever device.
    """
    return _autocast_off_on_meta.block()


def without_torch_functions() -> AbstractContextManager[Any]:
    """No torch-function mode and no override sees torch calls in here."""
    return torch._C.DisableTorchFunction()  # type: ignore[no-any-return, no-untyped-call]


def show_backward_to_modes() -> None:
    """Torch-function modes see calls of ``torch.autograd.backward`` from now on.

    Before torch 2.11 they see ``Tensor.backward`` alone: there, the function is replaced by one
    that asks the modes of its thread first, as newer torch does by itself.
    """
    backward = torch.autograd.backward
    if _SHOWN_BY_TORCH or hasattr(backward, "shown_to_modes"):
        return

    @functools.wraps(backward)
    def shown(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = tensors if isinstance(tensors, (list, tuple)) else (tensors,)
        if has_torch_function(outputs):
            return handle_torch_function(shown, outputs, tensors, *args, **kwargs)
        return backward(tensors, *args, **kwargs)

    shown.shown_to_modes = True  # type: ignore[attr-defined]
    torch.autograd.backward = shown


def is_wrapper_subclass(tensor: Tensor) -> bool:
    """Whether a tensor holds others in place of data: a DTensor, a quantised weight."""
    return bool(is_traceable_wrapper_subclass(tensor))


def result_of_shape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor that nothing else uses in another shape: no view, to autograd, as torch's products.

    FSDP2 warns of modules that return views.
    """
    return torch.ops.aten._unsafe_view(tensor, shape)  # type: ignore[no-any-return]


def waited_for_by_ddp(module: Any) -> int:
    """How many parameters a DistributedDataParallel averages the gradients of; 0: unknown."""
    return int(module._get_ddp_logging_data().get("num_parameter_tensors", 0))


def local_tensor(dtensor: Any) -> Tensor:
    """A DTensor's part in this process: one object, where ``to_local()`` may make new ones."""
    return dtensor._local_tensor  # type: ignore[no-any-return]


def box_of(dtensor: Any) -> list[tuple[int, int]] | None:
    """What of each dimension of a DTensor is local, from and up to; None: not one block.

    A dimension may be sharded over several dimensions of the mesh. FSDP2 over tensor parallelism
    gives strided shards, whose parts are blocks where the factor says just what comes after.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = dtensor.device_mesh, dtensor.placements
    for position, placement in enumerate(placements):
        factor = getattr(placement, "split_factor", None)
        if factor is not None:
            inner = 1
            for size, other in zip(
                mesh.shape[position + 1 :], placements[position + 1 :], strict=True
            ):
                inner *= size if getattr(other, "dim", None) == placement.dim else 1
            if inner != factor:
                return None
        elif not isinstance(placement, (Replicate, Shard)):
            return None
    shape, offset = compute_local_shape_and_global_offset(dtensor.shape, mesh, placements)
    return [(first, first + size) for first, size in zip(offset, shape, strict=True)]


def _parts_of_fsdp(module: Any) -> tuple[Any, Any]:
    """What FSDP2 knows of a module, and of the parameters that it gathers together."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # older torch has at most one
        groups = [group for group in (state._fsdp_param_group,) if group is not None]
    return state, groups


def is_gathering(module: Any) -> bool:
    """Whether FSDP2 has begun to gather a module's parameters, and nobody has waited for it."""
    _, groups = _parts_of_fsdp(module)
    return any(getattr(group, "_all_gather_result", None) is not None for group in groups)


def is_in_forward(module: Any) -> bool:
    """Whether FSDP2 takes a module to be within a forward pass."""
    state, _ = _parts_of_fsdp(module)
    root = getattr(getattr(state, "_state_ctx", None), "iter_forward_root", None)
    own = getattr(getattr(state, "_training_state", None), "name", "")
    return root is not None or own == "FORWARD"


def forget_forward_order(module: Any) -> None:
    """Drop the order in which a module's forward passes gathered, which a backward goes by.

    FSDP2 drops it after a backward; without any it grows.
    """
    state, groups = _parts_of_fsdp(module)
    for holder, name in (
        (getattr(state, "_comm_ctx", None), "post_forward_order"),
        *((group, "_post_forward_indices") for group in groups),
    ):
        if hasattr(holder, name):
            getattr(holder, name).clear()


def increment_versions(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that the tensors were written, as torch's in-place operations do."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except TypeError:  # older torch takes one at a time
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


def set_version(tensor: Tensor, version: int) -> None:
    """Tell autograd that the tensor is what it was at ``version``; where torch has no way, nothing.

    Only for a tensor that was restored to the bit.
    """
    setter = getattr(torch._C._autograd, "_unsafe_set_version_counter", None)
    if setter is None:
        return
    try:
        setter((tensor,), (version,))
    except TypeError:  # older torch takes one at a time
        setter(tensor, version)


def unhooked_step(optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    """The optimizer class's ``step`` without the hooks that torch wraps around it."""
    step: Callable[..., Any] = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step


def in_a_backward() -> bool:
    """Whether autograd is running backward, in this thread."""
    return torch._C._current_graph_task_id() != -1


def uncompiled(function: _Function) -> _Function:
    """Decorates what ``torch.compile`` must call and not trace; imports no compiler by itself."""
    wrapped: Any = _disable_dynamo(function)
    return wrapped  # type: ignore[no-any-return]


def making_optimizer_state() -> bool:
    """Whether ``torch.distributed.checkpoint`` calls an optimizer only to have its state made.

    It sets zero gradients and rates of 0, calls ``step()`` and then ``zero_grad()``.
    """
    if "torch.distributed.checkpoint.state_dict" not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(1)
    for _ in range(8):  # hooks and the compiler's guard lie between
        if frame is None:
            return False
        if frame.f_code.co_name == "_init_optim_state":
            return str(frame.f_globals.get("__name__", "")).startswith("torch.distributed.")
        frame = frame.f_back
    return False


def last_sequence_number() -> int:
    """Number of the autograd node that this thread made last."""
    return int(torch.autograd._get_sequence_nr()) - 1  # type: ignore[attr-defined]


def sequence_number(node: Any) -> int:
    """An autograd node's own number."""
    return int(node._sequence_nr())


class _SavingHooks(threading.local):
    """What this thread has pushed since :func:`know_saving_hooks`, the innermost last."""

    def __init__(self) -> None:
        self.pushed: list[Any] = []


_SAVING = _SavingHooks()


def know_saving_hooks() -> None:
    """:func:`saving_hook` knows of hooks that are set from now on.

    Newer torch tells by itself. Older torch has no such question: there, the two functions that set
    hooks and take them back are replaced by ones that keep count.
    """
    autograd: Any = torch._C._autograd
    push, pop = (
        autograd._push_saved_tensors_default_hooks,
        autograd._pop_saved_tensors_default_hooks,
    )
    if hasattr(autograd, "_top_saved_tensors_default_hooks") or hasattr(push, "counted"):
        return

    @functools.wraps(push)
    def pushed(pack: Any, unpack: Any) -> None:
        push(pack, unpack)
        _SAVING.pushed.append(pack)

    @functools.wraps(pop)
    def popped() -> None:
        pop()
        del _SAVING.pushed[-1:]  # none: it was pushed before

    pushed.counted = True  # type: ignore[attr-defined]
    autograd._push_saved_tensors_default_hooks = pushed
    autograd._pop_saved_tensors_default_hooks = popped


def saving_hook() -> Any:
    """What packs the tensors that autograd saves now, of what was set in this thread.

    None where nobody asked to. Call :func:`know_saving_hooks` before hooks are set.
    """
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        return _SAVING.pushed[-1] if _SAVING.pushed else None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def is_custom_function(node: Any) -> bool:
    """Whether an autograd node is of a function written in Python."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


class _Around(threading.local):
    """The mode that this thread's backward passes run in."""

    mode: AbstractContextManager[Any] | None = None


_AROUND = _Around()


@contextmanager
def backward_within(mode: AbstractContextManager[Any]) -> Generator[None, None, None]:
    """Backward passes that this thread starts in here run within a torch-function mode.

    By themselves they run in none, as a mode that sees ``backward`` is off while that runs: then
    nothing sees the torch calls of layers that checkpointing runs again.
    """
    engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    if not hasattr(engine, "runs_within"):

        @functools.wraps(engine)
        def run(*args: Any, **kwargs: Any) -> Any:
            with _AROUND.mode or nullcontext():
                return engine(*args, **kwargs)

        run.runs_within = True  # type: ignore[attr-defined]
        torch.autograd._engine_run_backward = run  # type: ignore[attr-defined]
    before, _AROUND.mode = _AROUND.mode, mode
    try:
        yield
    finally:
        _AROUND.mode = before
