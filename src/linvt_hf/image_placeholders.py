"""What the processors of bases that transformers lacks have in common: a picture stands in a prompt as one token."""

from typing import Any

from transformers.image_utils import make_flat_list_of_images


def check_placeholders(texts: list[str], images: Any, token: str) -> None:
    """Raises `ValueError` unless each `token` has an image, in each prompt if images are nested."""
    per_text = [prompt.count(token) for prompt in texts]
    if isinstance(images, (list, tuple)) and any(isinstance(group, (list, tuple)) for group in images):
        given = [len(group) for group in images]
        if given != per_text:
            raise ValueError(
                f"The prompts hold {per_text} image placeholders ({token}) each, but {given} images were given; pass "
                "one image for each placeholder."
            )
        return
    given = len(make_flat_list_of_images(images))
    if given != sum(per_text):
        raise ValueError(
            f"The text holds {sum(per_text)} image placeholders ({token}), but {given} images were given; pass one "
            "image for each placeholder."
        )


__all__ = ["check_placeholders"]
