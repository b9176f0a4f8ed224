"""The modes in which the optimizer works, whatever those of its caller are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from zofo_kernels import uninterrupted


@contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, no inference mode, and no signal but in a closure; afterwards as before.

    Tensors that are kept from step to step could not be written later, had they been made in
    inference mode. Signals wait, so that none cuts off what undoes a step.
    """
    recording, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    with uninterrupted():
        try:
            with torch.inference_mode(False) if inference else nullcontext():
                torch.set_grad_enabled(False)
                yield
        finally:
            torch.set_grad_enabled(recording)
