"""Whether a server's weights do change where they are loaded anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Likely = Sequence[dict[int, float]]
"""Log-probabilities of some tokens, a row a prompt."""
_SIZES = [4.0**k * 1e-3 for k in range(8)]
_ENOUGH = 0.1  # nats: more than products in 16 bits round, and little enough to compare


def check_effect(
    rest: Likely, by_adapter: Callable[[float], Likely], by_weights: Callable[[float], Likely]
) -> None:
    """A displacement of the weights shows in what is served as its adapter does.

    Servers fuse, pack and compile, so that weights written or loaded anew may not be those that
    are used; then updates would be lost without a word.

    Args:
        rest: at the weights as they are.
        by_adapter, by_weights: along one direction, by a displacement of this size.

    Raises:
        ValueError: it does not.
    """
    moved = 0.0
    for size in _SIZES:
        wanted = by_adapter(size)
        moved = _distance(rest, wanted)
        if moved >= _ENOUGH:
            break
    else:
        raise ValueError(
            "llm must serve adapters with effect, but one as large as the weights moves "
            f"log-probabilities by {moved:.1e} only"
        )
    off = _distance(wanted, by_weights(size))
    if off > moved / 4:
        raise ValueError(
            "llm must serve weights that are loaded anew as it serves adapters, but of a "
            f"displacement that moves log-probabilities by {moved:.2f} the result differs by "
            f"{off:.2f}: its updates would be lost. Is this a version of vLLM that zofo_optim was "
            "tried with?"
        )


def _distance(a: Likely, b: Likely) -> float:
    """Mean difference over the tokens that both have; infinite where there are none."""
    differences = [
        abs(x[token] - y[token]) for x, y in zip(a, b, strict=True) for token in x.keys() & y.keys()
    ]
    return sum(differences) / len(differences) if differences else float("inf")
