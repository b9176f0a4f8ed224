"""Each update rule restated in plain Python, from its formula; a history takes the place of state.

``REFERENCES[name](rule, coefficients, history)`` takes a list of numbers, and returns the new ones.
``history`` is a list: of each step that had a known slope, their mean square; the reference
adds to it. A coefficient that is 0, or not finite, is not known and becomes 0.
"""

import math
import statistics
from fractions import Fraction


def is_known(coefficient):
    return coefficient != 0 and math.isfinite(coefficient)


def slopes_of(coefficients):
    """The known ones, by place: coefficients are slopes over the number of samples."""
    return {s: c * len(coefficients) for s, c in enumerate(coefficients) if is_known(c)}


def averaged(shaped, count):
    """Back to coefficients, with 0 where nothing was known."""
    return [shaped.get(s, 0.0) / count for s in range(count)]


def remember(history, slopes):
    if slopes:
        history.append(math.fsum(x * x for x in slopes.values()) / len(slopes))


def weight(beta, history):
    """Adam's bias correction: the weights of a sum of so many steps."""
    return 1 - beta ** len(history)


def mean_square(beta, history):
    """Before its correction."""
    last = len(history) - 1
    return math.fsum((1 - beta) * beta ** (last - t) * m for t, m in enumerate(history))


def root_mean_square(beta, history):
    return math.sqrt(mean_square(beta, history) / weight(beta, history)) if history else 0.0


def state_of(rule, history):
    """What a state dict holds of the rule, by this history."""
    if type(rule).__name__ == "Normalized" or getattr(rule, "relative", False):
        beta = rule.beta
        return {"mean_square": mean_square(beta, history), "weight": weight(beta, history)}
    return {}


# ---- the rules --------------------------------------------------------------------------------


def sgd(rule, coefficients, history):
    return list(coefficients)


def normalized(rule, coefficients, history):
    slopes = slopes_of(coefficients)
    remember(history, slopes)
    size = root_mean_square(rule.beta, history) + rule.eps
    return averaged({s: x / size for s, x in slopes.items()}, len(coefficients))


def clip(rule, coefficients, history):
    limit = rule.limit
    if rule.relative:
        limit = limit * root_mean_square(rule.beta, history) if history else math.inf
    clipped = {s: max(-limit, min(limit, x)) for s, x in slopes_of(coefficients).items()}
    if rule.relative:
        remember(history, clipped)
    return averaged(clipped, len(coefficients))


def sign(rule, coefficients, history):
    signs = {s: math.copysign(1.0, x) for s, x in slopes_of(coefficients).items()}
    return averaged(signs, len(coefficients))


def zscore(rule, coefficients, history):
    count = len(coefficients)
    slopes = {s: Fraction(c) * count for s, c in enumerate(coefficients) if is_known(c)}
    if not slopes:
        return [0.0] * count
    mean = sum(slopes.values()) / len(slopes)
    deviation = math.sqrt(statistics.pvariance(slopes.values()))
    shaped = {s: float(x - mean) / (deviation + rule.eps) for s, x in slopes.items()}
    return averaged(shaped, count)


def centered_rank(rule, coefficients, history):
    known = {s: c for s, c in enumerate(coefficients) if is_known(c)}
    ranks = {}
    for s, c in known.items():
        lower = sum(other < c for other in known.values())
        equal = sum(other == c for other in known.values()) - 1
        others = max(len(known) - 1, 1)
        ranks[s] = (lower + equal / 2) / others - 0.5 if len(known) > 1 else 0.0
    return averaged(ranks, len(coefficients))


REFERENCES = {
    "SGD": sgd,
    "Normalized": normalized,
    "Clip": clip,
    "Sign": sign,
    "ZScore": zscore,
    "CenteredRank": centered_rank,
}


def reference(rule, coefficients, history):
    return REFERENCES[type(rule).__name__](rule, coefficients, history)
