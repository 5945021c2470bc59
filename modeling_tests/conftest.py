"""No network, and no cache left behind: set before transformers is imported anywhere."""

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="linvt-tests-")
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
torch.set_num_threads(1)  # models this small only lose by sharing their work


@pytest.fixture(autouse=True)
def _nothing_deprecated(caplog):
    """transformers announces most of what it will remove in its log, which pytest's warning filters do not see."""
    yield
    said = [record.getMessage() for record in caplog.get_records("call") if "deprecat" in record.getMessage().lower()]
    assert not said
