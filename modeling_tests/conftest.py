"""No network, and no cache left behind: set before transformers is imported anywhere."""

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="linvt-tests-")
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
torch.set_num_threads(1)  # models this small only lose by sharing their work
