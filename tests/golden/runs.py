"""Short trainings whose every bit was recorded by an earlier version; see ``record.py``.

The loss is made of few elements by single torch operations, each exactly rounded, so that it is
the same on every machine. What may differ between machines is Gaussian noise, by the last bits:
``noise_marks`` tells whether it does.
"""

import copy
import hashlib
import itertools
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import Parameter

from zofo_kernels import Direction, noise
from zofo_optim import HybridZOFO, Journal

FOLDER = Path(__file__).parent
FILE = FOLDER / "results.pt"
JOURNALS = FOLDER / "journals"
SEED = 2026
SHAPES = {"a": (37, 11), "b": (130,), "c": (3, 5, 2)}
DTYPES = ("float32", "float64", "bfloat16", "float16")
STEPS = 4


class Case(NamedTuple):
    dtype: str
    perturbation: str
    distribution: str
    mode: str
    estimator: str
    samples: int
    rounding: str = "stochastic"

    @property
    def name(self):
        return "-".join(map(str, self))


CASES = [
    *(
        Case(*every)
        for every in itertools.product(
            DTYPES,
            ("in_place", "streamed"),
            ("gaussian", "rademacher"),
            ("zo", "hybrid"),
            ("one_sided", "two_sided"),
            (1, 3),
        )
    ),
    *(
        Case(dtype, "in_place", "gaussian", "hybrid", "two_sided", 2, "nearest")
        for dtype in ("bfloat16", "float16")
    ),
]
RECORDED = [case for case in CASES if (case.mode, case.samples) == ("hybrid", 3)]
"""Those that write a journal as well."""
RECORDED_INTERPRETED = [
    case
    for case in CASES
    if (case.mode, case.samples, case.estimator) == ("hybrid", 1, "two_sided")
]
"""Those that were recorded in Triton's interpreter too."""
INTERPRETED = [
    Case("float32", "in_place", "gaussian", "hybrid", "two_sided", 1),
    Case("float64", "streamed", "gaussian", "hybrid", "two_sided", 1),
    Case("bfloat16", "in_place", "gaussian", "hybrid", "two_sided", 1),
    Case("float16", "streamed", "gaussian", "hybrid", "two_sided", 1),
    Case("float32", "streamed", "rademacher", "zo", "one_sided", 3),
    Case("float64", "in_place", "rademacher", "zo", "two_sided", 1),
    Case("bfloat16", "streamed", "rademacher", "hybrid", "one_sided", 1),
    Case("float16", "in_place", "rademacher", "hybrid", "two_sided", 3),
]
"""Those that are run there, which is slow: each dtype meets each perturbation and distribution.

Of Gaussian noise they are among those recorded there; signs are the same on all backends.
"""


def start(dtype):
    """Weights by a formula of exact numbers: no generator's definition enters."""
    found = {}
    for place, (name, shape) in enumerate(SHAPES.items()):
        count = torch.Size(shape).numel()
        numbers = (torch.arange(count) * (37 + 2 * place) + 11) % 251
        values = (numbers.double() - 125) / 128 + 1 / 256
        found[name] = Parameter(values.reshape(shape).to(getattr(torch, dtype)), False)
    found["y"] = Parameter(torch.tensor([0.75]))
    return found


def optimizer_of(case, weights, backend):
    groups = [
        {
            "params": [weights["a"], weights["b"]],
            "param_names": ["a", "b"],
            "mode": "zo",
            "lr": 2e-3,
            "mu": 1e-2,
            "weight_decay": 0.125,
        },
        {
            "params": [weights["c"]],
            "param_names": ["c"],
            "mode": "zo",
            "lr": 1e-3,
            "mu": 2e-2,
            "maximize": True,
        },
    ]
    if case.mode == "hybrid":
        groups.insert(1, {"params": [weights["y"]], "param_names": ["y"], "mode": "fo"})
    return HybridZOFO(
        groups,
        lr=0.125,
        momentum=0.5 if case.mode == "hybrid" else 0,
        estimator=case.estimator,
        num_samples=case.samples,
        distribution=case.distribution,
        perturbation=case.perturbation,
        rounding=case.rounding,
        seed=SEED,
        noise_version=1,
        backend=backend,
    )


def closure_of(case, weights, batch):
    wide = torch.float64 if case.dtype == "float64" else torch.float32

    def closure():
        a = weights["a"].flatten()[batch].to(wide)
        b = weights["b"][3 * batch + 1].to(wide)
        c = weights["c"].flatten()[batch + 7].to(wide)
        loss = a * b + c * c + a
        if case.mode == "hybrid":
            loss = loss * (weights["y"][0] + 0.5)
        return loss

    return closure


def train(optimizer, case, weights, first, last):
    """Steps ``first`` to ``last``; every second one accumulates over two batches."""
    for step in range(first, last):
        optimizer.zero_grad()
        if step % 2:
            optimizer.backward(closure_of(case, weights, step))
            optimizer.backward(closure_of(case, weights, step + 1))
            optimizer.step()
        else:
            optimizer.step(closure_of(case, weights, step))


def run(case, backend, journal=None):
    """Weights after ``STEPS`` steps, and a state dict saved while step 3 accumulates."""
    weights = start(case.dtype)
    optimizer = optimizer_of(case, weights, backend)
    recording = None if journal is None else Journal(journal).attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(optimizer, case, weights, 0, STEPS - 1)
        optimizer.zero_grad()
        optimizer.backward(closure_of(case, weights, 5))
        saved = {
            "weights": {name: p.detach().clone() for name, p in weights.items()},
            "grad": None if weights["y"].grad is None else weights["y"].grad.clone(),
            "state": copy.deepcopy(optimizer.state_dict()),
        }
        finish(optimizer, case, weights)
    if recording is not None:
        recording.close()
    return {"saved": saved, "weights": {name: p.detach().clone() for name, p in weights.items()}}


def finish(optimizer, case, weights):
    """The rest of the step in which the state dict was saved."""
    optimizer.backward(closure_of(case, weights, 6))
    optimizer.step()


def go_on(case, backend, saved):
    """As :func:`run` ends, from what was saved on its way."""
    weights = {
        name: Parameter(tensor.clone(), name == "y") for name, tensor in saved["weights"].items()
    }
    optimizer = optimizer_of(case, weights, backend)
    optimizer.load_state_dict(copy.deepcopy(saved["state"]))
    if saved["grad"] is not None:
        weights["y"].grad = saved["grad"].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        finish(optimizer, case, weights)
    return {name: p.detach() for name, p in weights.items()}


def noise_marks(backend):
    """Of each distribution, a hash of all noise that the runs draw."""
    marks = {}
    for distribution in ("gaussian", "rademacher"):
        digest = hashlib.sha256()
        for step, sample in itertools.product(range(STEPS), range(3)):
            direction = Direction(SEED, step, sample, distribution)
            for index, shape in enumerate(SHAPES.values()):
                z = noise(shape, direction, index=index, backend=backend)
                digest.update(z.numpy().tobytes())
        marks[distribution] = digest.hexdigest()
    return marks


def recorded_on(case, backend):
    """The backend whose results stand for this one: Rademacher noise is the same on all."""
    return "reference" if case.distribution == "rademacher" else backend
