"""Smoothness along a run: measured every so many steps, beside the rates and their limits."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation import Closure
from ..groups_and_state import GroupsAndState
from ..whole import whole
from .alarms import Alarms
from .plots import draw_rows
from .snapshot import METHODS, Snapshots

Row = dict[str, Any]
FORMAT = "zofo-optim smoothness rows"
VERSION = 1


class SmoothnessRecorder:
    """Measures the smoothness of a run on its own batches, and warns of rates that are too large.

    Call :meth:`step` with the closure of each step, before the optimizer takes it. Every so many
    steps it measures the loss of that closure at the weights then: for the zeroth-order ("zo") and
    the first-order ("fo") groups the gradient's norm, L_x and L_y (Ma, Yu, Huang 2026,
    Definition 2.1), the trace and the Frobenius norm of the Hessian's block, and the learning rate
    up to which steps are stable. The run is not changed, to the bit: weights, ``.grad``, buffers,
    the optimizer and all global generators are as before.

    A limit is that of a quadratic with the curvature of this batch at these weights, all groups of
    a mode having one rate, and the other mode standing still. For ``torch.optim.SGD`` it is
    2 / lambda_max, with momentum 2 (1 + beta) / lambda_max; there is none for other first-order
    optimizers, whose steps are preconditioned. For zeroth order it is
    2 E[grad f . g] / E[g' H g] along directions as steps take them, about 2 / tr H with one; there
    is none where ``zo_rule`` is another than "sgd", some tensors rest (``active``), or groups
    differ in ``mu``. A limit is None too where the loss curves downwards, or curvature along steps
    is mostly rounding, or less than its standard error. It is taken at ``mu`` or a longer
    displacement, for which the first measurement looks, and later ones where noise has grown.

    Warns once a group where its rate was above its limit by more than ``margin`` in ``patience``
    measurements in a row: one batch is noise, and a rate a little above the limit is not unusual
    for a run that learns (Cohen et al. 2021). Measurements without a limit do not count. Warns at
    once where a rate is more than 4 times its limit, and where the loss is not finite or more than
    10 times that of the first row.

    Cost of a measurement: for each mode, 3 + ``directions`` + ``products`` gradients with
    ``method="finite_difference"``; for zeroth-order groups 1 + 2 ``directions`` evaluations and
    some 10 to 25 that verify besides, and 60 to 100 where a displacement is looked for.
    ``evaluations`` and ``gradients`` of a row count its own: forward passes without a backward, and
    backward passes.
    Memory: a backward through the base model and ``products`` vectors of its size, or with
    ``method="forward"`` no backward for zeroth-order groups at all. Between measurements, a float32
    vector of each block's size that was measured by gradients stays in host memory.

    Args:
        optimizer: a :class:`~zofo_optim.HybridZOFO` in one process.
        every: steps from one measurement to the next; the first step is measured.
        directions: random directions, for traces and Frobenius norms, at least 2.
        products: of Hessian and vector, for the largest eigenvalue by Lanczos's method, which goes
            on from where the last measurement ended; it comes from below.
        method: "finite_difference" or "exact": see :func:`measure_smoothness`; "forward": the
            zeroth-order groups by losses alone, where a backward through the base model does not
            fit. Then there is no largest eigenvalue of theirs, and a Frobenius norm with full
            Gaussian directions only; first-order groups are measured by gradients still. Where
            the closure computes in 16 bits, differences are rounding: "finite_difference" is
            refused, "forward" takes double backward for first-order groups, and zeroth-order
            groups have no limit, and with "forward" no trace either.
        margin: share of its limit by which a rate may be above it, >= 0.
        patience: measurements in a row that make a warning, at least 1.
        seed: of the directions.

    Attributes:
        rows: one dictionary a measurement, of numbers and None: ``step``, ``loss``,
            ``evaluations``, ``gradients``, and with ``_zo`` or ``_fo`` at their ends
            ``gradient_norm``, ``smoothness`` (the largest eigenvalue's magnitude, or the Frobenius
            norm, which is a bound of it), ``lambda_max`` and ``lambda_min`` (the ends of the
            block's spectrum), ``largest`` (the one of larger magnitude), ``frobenius``, ``trace``
            and their ``..._error``, ``lr`` (the largest of the groups'), and ``stable_lr`` (the
            least of their limits).
        steps: how often :meth:`step` was called.

    Raises:
        TypeError: ``optimizer`` is no HybridZOFO.
        ValueError: an argument out of its range.

    Example:
        >>> recorder = SmoothnessRecorder(optimizer, every=50)
        >>> for batch in loader:
        ...     closure = lambda: model(**batch).loss
        ...     optimizer.zero_grad()
        ...     recorder.step(closure)
        ...     optimizer.step(closure)
        >>> recorder.save("smoothness.csv")
    """

    def __init__(
        self,
        optimizer: GroupsAndState,
        every: int = 50,
        directions: int = 8,
        *,
        products: int = 8,
        method: str = "finite_difference",
        margin: float = 0.25,
        patience: int = 2,
        seed: int = 0,
    ) -> None:
        if not isinstance(optimizer, GroupsAndState):
            raise TypeError(f"optimizer must be a HybridZOFO, got {type(optimizer).__name__}")
        least = dict(every=1, directions=2, products=1, patience=1, seed=0)
        for (name, low), value in zip(
            least.items(), (every, directions, products, patience, seed), strict=True
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be an int >= {low}, got {value!r}")
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not margin >= 0:
            raise ValueError(f"margin must be a number >= 0, got {margin!r}")
        self._every, self._seed = every, seed
        self._snapshots = Snapshots(optimizer, directions, products, method)
        self.rows: list[Row] = []
        self.steps = 0
        self._alarms = Alarms(optimizer, margin, patience)

    def step(self, closure: Closure | Sequence[Closure]) -> Row | None:
        """Measure if it is time; to be called before each step of the optimizer.

        Args:
            closure: what ``optimizer.step`` takes; it is run several times. Where micro-batches
                accumulate, what ``optimizer.backward`` takes of each, in a list: their sum is
                measured, as the optimizer adds them up.

        Returns:
            The new row, or None.

        Raises:
            RuntimeError: several processes train the model, or called from inside a closure.
            TypeError, ValueError: ``closure`` is none, or its result is no loss; or weights have 16
                bits, or the closure computes in 16 bits, where ``method="finite_difference"``.
                Nothing is recorded then.
        """
        row = None if self.steps % self._every else self.measure(closure)
        self.steps += 1
        return row

    def measure(self, closure: Closure | Sequence[Closure], step: int | None = None) -> Row:
        """Measure now; see :meth:`step`.

        Args:
            closure: likewise.
            step: what the row says; None: ``steps``.
        """
        said = self.steps if step is None else step
        row: Row = {"step": said, **self._snapshots.take(closure, self._seed + len(self.rows))}
        self.rows.append(row)
        self._alarms.look(self.rows, self._snapshots.rates)
        return row

    def scatter(self) -> dict[str, tuple[list[float], list[float]]]:
        """Norms of the whole gradient and the smoothness of each block: see :func:`plot_scatter`.

        The whole gradient is that of both modes together; rows without a number are left out.
        """
        found: dict[str, tuple[list[float], list[float]]] = {}
        for mode in ("zo", "fo"):
            pairs = [
                (math.hypot(*norms), row[f"smoothness_{mode}"])
                for row in self.rows
                if row.get(f"smoothness_{mode}") is not None
                for norms in [[v for k, v in row.items() if k.startswith("gradient_norm_")]]
                if None not in norms
            ]
            if pairs:
                found[mode] = ([t for t, _ in pairs], [c for _, c in pairs])
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows: as CSV where ``path`` ends in .csv, else as JSON, which can be loaded."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as fresh, open(fresh, "w", newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                names = dict.fromkeys(name for row in self.rows for name in row)
                writer = csv.DictWriter(file, list(names))
                writer.writeheader()
                writer.writerows(self.rows)
            else:
                json.dump(self.state_dict(), file, indent=1)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a JSON file of :meth:`save`, in place of the rows here.

        Raises:
            ValueError: the file is none of these.
        """
        try:
            self.load_state_dict(json.loads(Path(path).read_bytes().decode()))
        except ValueError as error:  # as are JSONDecodeError and UnicodeDecodeError
            raise ValueError(
                f"path must be a JSON file of SmoothnessRecorder.save, got {str(path)!r}: {error}"
            ) from None

    def state_dict(self) -> dict[str, Any]:
        """Rows and steps, as JSON has them. Lanczos's vectors are not in it: they begin anew."""
        rows = [dict(row) for row in self.rows]
        return {"format": FORMAT, "version": VERSION, "steps": self.steps, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"state must have the format {FORMAT!r}, got {state!r:.80}")
        if state.get("version") != VERSION:
            raise ValueError(f"state must have version {VERSION}, got {state.get('version')!r}")
        self.rows, self.steps = [dict(row) for row in state["rows"]], int(state["steps"])
        self._alarms.clear()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw gradient norms, smoothness, and rates beside their limits, by step.

        Needs matplotlib.
        """
        draw_rows(self.rows, path)
