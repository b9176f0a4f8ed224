"""How the loss at a displaced point is evaluated: by moving the weights, or by copies of them."""

from .base import Perturbation
from .in_place import InPlacePerturbation
from .streamed import StreamedPerturbation

PERTURBATIONS: dict[str, type[Perturbation]] = {
    "in_place": InPlacePerturbation,
    "streamed": StreamedPerturbation,
}

__all__ = ["PERTURBATIONS", "InPlacePerturbation", "Perturbation", "StreamedPerturbation"]
