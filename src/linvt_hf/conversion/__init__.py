"""Making LinVT models: `wrap` gives an image-LLM eyes for video."""

from .convert import convert
from .wrap import wrap

__all__ = ["convert", "wrap"]
