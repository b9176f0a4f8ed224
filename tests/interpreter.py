"""Triton's interpreter, which repeats itself less: the same operations, results and checks.

It spends its time on Python around each operation, not on elements. What is left out here is done
anew by every operation though nothing depends on it; where another version of Triton has other
names, nothing is left out.
"""

import functools
import inspect

NOISE = ("gaussian", "signs", "rounding_bits")
"""Kernels' functions of numbers alone: most passes want the noise that an earlier one made."""
KEPT = 1024
"""Tiles of noise, of 16 kB at most."""


def hurry(kernels):
    """Speed up the interpreter in this process for good.

    Args:
        kernels: the module that defines the functions ``NOISE``.
    """
    import triton.runtime.interpreter as interpreter

    options = interpreter.interpreter_builder.options
    if not getattr(options, "debug", True) and hasattr(options, "sanitize_overflow"):
        # the sums that would find an overflow are made, and then read in debug mode only
        object.__setattr__(options, "sanitize_overflow", False)
    if hasattr(interpreter, "_get_np_dtype"):
        _look_up_dtypes(interpreter)
    if hasattr(interpreter, "_patch_lang"):
        _patch_once_a_launch(interpreter)
    for name in NOISE:
        function = getattr(kernels, name)
        function.rewritten_fn[function.fn] = _remembering(function.rewrite())


def _look_up_dtypes(interpreter):
    """Not by a table that each call makes."""
    import triton.language as tl

    of_any = interpreter._get_np_dtype
    of_number = functools.cache(of_any)

    def np_dtype(dtype):
        element = dtype.scalar
        return of_any(dtype) if isinstance(element, tl.pointer_type) else of_number(element)

    interpreter._get_np_dtype = np_dtype


def _patch_once_a_launch(interpreter):
    """Triton's language is patched for a module's functions when the first of them is called."""
    launch, call = interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__
    patched = set()

    @functools.wraps(launch)
    def first_of_all(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    @functools.wraps(call)
    def called(self, *args, **kwargs):
        names = id(self.fn.__globals__)
        if names in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(names)
        return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = first_of_all
    interpreter.InterpretedFunction.__call__ = called


def _remembering(function):
    """``function``, which keeps its last results by the values of its arguments."""
    signature, kept = inspect.signature(function), {}

    @functools.wraps(function)
    def remembered(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments.values()
        key = tuple(map(_value, given))
        if key not in kept:
            if len(kept) == KEPT:
                del kept[next(iter(kept))]
            kept[key] = function(*args, **kwargs)
        return kept[key]

    return remembered


def _value(argument):
    if not hasattr(argument, "handle"):
        return getattr(argument, "value", argument)
    data = argument.handle.data
    return str(argument.type), data.shape, data.tobytes()
