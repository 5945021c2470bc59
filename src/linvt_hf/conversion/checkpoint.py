"""An original checkpoint: its config, its files, and its tensors, which are read one by one."""

import json
import pickle
import zipfile
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from .rules import Shape

# Never code: nothing that a checkpoint brings along is run.
_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_WEIGHTS = (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "*.bin"))


class Checkpoint:
    """
    A folder or Hub repo as its makers published it. Nothing but config.json is read before it is asked for.

    Args:
        path: the folder, or the Hub id.
        revision: of a Hub repo.

    Raises `OSError` if there is no config.json.
    """

    def __init__(self, path: str | Path, revision: str | None = None):
        self.path = str(path)
        try:
            file = cached_file(path, CONFIG_NAME, revision=revision)
        except OSError as error:
            raise OSError(f"There is no model at {path} that can be loaded: {str(error).splitlines()[0]}") from error
        if file is None:
            raise OSError(f"There is no model at {path} that can be loaded: it holds no {CONFIG_NAME}.")
        self.commit = extract_commit_hash(file, None)
        self.revision = self.commit or revision
        self._last: tuple = (None, None)  # a file and its open handle
        self.config: dict = json.loads(Path(file).read_text(encoding="utf-8"))

    @cached_property
    def folder(self) -> Path:
        """Where all its files are, downloaded first if it lies on the Hub."""
        if Path(self.path).is_dir():
            return Path(self.path)
        names = HfApi().list_repo_files(self.path, revision=self.revision)
        weights = next(
            (kind for _, kind in _WEIGHTS if any(name.endswith(kind[1:]) for name in names)), "*.safetensors"
        )
        return Path(snapshot_download(self.path, revision=self.revision, allow_patterns=[*_TEXT_FILES, weights]))

    def file(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.is_file() else None

    def json(self, name: str) -> dict:
        """A JSON file's content; empty if there is no such file."""
        file = self.file(name)
        return {} if file is None else json.loads(file.read_text(encoding="utf-8"))

    @cached_property
    def files_of_tensors(self) -> dict[str, Path]:
        """
        Which file holds each tensor. Raises `OSError` for a file that is missing or cut short, `ValueError` for a
        tensor that the index names and its file lacks.
        """
        for name, _ in _WEIGHTS:
            if index := self.json(f"{name}.index.json"):
                wanted: dict[str, str] = index["weight_map"]
                break
            if self.file(name):
                wanted = dict.fromkeys(self._names(self.folder / name), name)
                break
        else:
            raise OSError(
                f"{self.path} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index."
            )
        for shard in sorted(set(wanted.values())):
            if self.file(shard) is None:
                raise OSError(f"{self.path} lacks {shard}, which its index names; fetch it again.")
            held = self._names(self.folder / shard)
            if absent := [name for name, where in wanted.items() if where == shard and name not in held]:
                raise ValueError(
                    f"{self.folder / shard} lacks {len(absent)} tensors of the index, such as {absent[0]}."
                )
        return {name: self.folder / shard for name, shard in wanted.items()}

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of all tensors, read from the files' headers."""
        return {name: self._shape(file, name) for name, file in self.files_of_tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file rather than copied."""
        file = self.files_of_tensors[name]
        return self._open(file)[name] if file.suffix == ".bin" else self._open(file).get_tensor(name)

    def close(self) -> None:
        """Lets go of the file that was read last."""
        self._last = (None, None)

    def _open(self, file: Path):
        """A file of tensors. The last one stays open, as most tensors of a file are asked for one after another."""
        if self._last[0] != file:
            self.close()
            try:
                self._last = (file, _open(file))
            except (SafetensorError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise OSError(f"{file} is cut short or no file of tensors ({reason}); fetch it again.") from error
        return self._last[1]

    def _names(self, file: Path) -> set[str]:
        return set(self._open(file).keys())

    def _shape(self, file: Path, name: str) -> Shape:
        opened = self._open(file)
        return tuple(opened[name].shape if file.suffix == ".bin" else opened.get_slice(name).get_shape())


def _open(file: Path):
    if file.suffix == ".bin":
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return safe_open(file, framework="pt")
