from .forward import Along, along_directions

__all__ = ["Along", "along_directions"]
