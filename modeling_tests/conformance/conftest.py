"""Skips what skips.py names, and writes the media that upstream's tests would fetch from the Hub."""

import fnmatch
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skips import SKIPS


def pytest_collection_modifyitems(items):
    for item in items:
        table = SKIPS.get(item.path.stem.removeprefix("conformance_"), {})
        for pattern, reason in table.items():
            if any(fnmatch.fnmatchcase(name, pattern) for name in (item.name, f"{item.cls.__name__}.{item.name}")):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure():
    media = Path(os.environ["LINVT_CONFORMANCE_MEDIA"])
    media.mkdir(parents=True, exist_ok=True)
    # As large as the tiny vision encoders' input, so that no base cuts it into tiles.
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(media / "coco_sample.png")
