"""Making LinVT models: `wrap` gives an image-LLM eyes for video."""

from .wrap import wrap

__all__ = ["wrap"]
