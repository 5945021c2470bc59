"""
FeatureCache: the visual tokens of frozen image-LLMs, computed once.

While vision encoder and projector are frozen, a video's frames give the same tokens in every epoch, and computing
them is most of the work. One pass before training stores them, T x N x D numbers a video; samples then hold
`frame_features` instead of `pixel_values_videos`. That pays for small data sets and small machines: 32 frames of 256
tokens of width 3584 in bfloat16 are 59 MB.

An entry is found by the video file's path, size and time of change, how it is sampled, and a fingerprint of the vision
encoder, the projector, the image processor and the precision. If any of these changes, the entry is not found; it is
never stale.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import BatchFeature

from ..image_llm import features_per_frame
from ..modeling_linvt import LinVTForConditionalGeneration
from ..modeling_videos import FRAME_PREFIX
from ..processing_linvt import LinVTProcessor
from ..processing_videos import cat_padded
from .media import SkippedSample, VideoInput, read_frames

if TYPE_CHECKING:
    from .dataset import ChatDataset

_FORMAT = "2"


class FeatureCache:
    """
    Frames' visual tokens, in a folder, in memory, or both.

    Args:
        folder: for files that outlive the run. Several runs, and bases, may share one.
        memory: keep everything in memory, for data that fits; `ChatDataset` then keeps its token ids too.

    `fill` comes first: a data set's workers have no model to compute with.
    """

    def __init__(self, folder: str | Path | None = None, *, memory: bool = False):
        if folder is None and not memory:
            raise ValueError("A FeatureCache needs a folder, memory=True, or both.")
        self.folder = None if folder is None else Path(folder)
        self.memory = memory
        self.fingerprint: str | None = None
        self._entries: dict[str, dict[str, Tensor]] = {}
        self._digests: dict[int, tuple[Any, str]] = {}  # of videos that are in memory themselves

    def fill(
        self,
        model: LinVTForConditionalGeneration,
        dataset: "ChatDataset",
        *,
        workers: int = 0,
        progress: bool = True,
        share: tuple[int, int] = (0, 1),
    ) -> int:
        """
        Computes what is missing of a data set's videos, and returns how many that were. Videos that cannot be read are
        reported to the data set, which skips them.

        Args:
            model: the model that is trained, on the device that computes.
            workers: processes that read videos.
            progress: whether to show a bar.
            share: for several processes with one folder, which of how many this is; each computes its own part.

        Raises `ValueError` if the vision encoder or the projector is to be trained.
        """
        check_frozen(model)
        self.fingerprint = fingerprint(model, dataset.processor)
        missing: dict[str, VideoInput] = {}
        for video in dataset.videos():
            try:
                key = self._key(dataset.processor, video)
            except SkippedSample:
                continue  # said again, and reported, when its sample is made
            mine = int(key[:8], 16) % share[1] == share[0]  # by its key: the list may differ between processes
            if mine and key not in missing and not self._has(key):
                missing[key] = video
        if not missing:
            return 0
        reader = _Reader(dataset.processor, list(missing.values()))
        loader = DataLoader(reader, batch_size=None, num_workers=workers, collate_fn=_same)
        modes = {module: module.training for module in model.base.modules()}
        model.base.eval()
        computed = 0
        try:
            pairs = zip(missing, loader, strict=True)
            for key, frames in tqdm(pairs, "visual features", len(missing), disable=None if progress else True):
                if isinstance(frames, SkippedSample):
                    dataset.report(missing[key].origin, frames)
                    continue
                self._store(key, _encode(model, frames))
                computed += 1
        finally:
            for module, mode in modes.items():
                module.training = mode
        return computed

    def inputs(self, processor: LinVTProcessor, videos: list[VideoInput]) -> dict[str, Tensor]:
        """
        What a sample with these videos has in place of frames: `frame_features` [sum of T, N, D], `frames_num_tokens`
        [sum of T], `num_frames` [V], and `frame_times` and `frames_*` as the processor gives them.

        Raises `SkippedSample` for a video that cannot be read, `ValueError` for one that `fill` has not seen.
        """
        if self.fingerprint is None:
            raise ValueError("The feature cache is not filled yet; call fill(model, dataset) before training.")
        entries = []
        for video in videos:
            entry = self._load(self._key(processor, video))
            if entry is None:
                read_frames(processor, [video])  # says so if that is the reason
                raise ValueError(
                    f"{video.origin}: the feature cache holds nothing for {video.path or 'its video'}, which is new "
                    "or has changed since the cache was filled; fill it again."
                )
            entries.append(entry)
        if len(entries) == 1:
            entry = entries[0]
            return {name: value[None] if name == "frame_times" else value for name, value in entry.items()}
        joined = {}
        for name in dict.fromkeys(name for entry in entries for name in entry):
            if name == "frame_times":
                even = [torch.arange(int(entry["num_frames"]), dtype=torch.float32) for entry in entries]
                rows = [entry.get(name, row) for entry, row in zip(entries, even, strict=True)]
                joined[name] = pad_sequence(rows, batch_first=True)
            else:
                joined[name] = cat_padded([entry[name] for entry in entries])
        return joined

    # ---- entries ----

    def _key(self, processor: LinVTProcessor, source: VideoInput) -> str:
        if isinstance(source.video, (list, tuple)):
            video = " ".join(self._stamp(v) if isinstance(v, (str, Path)) else self._digest(v) for v in source.video)
        elif source.path is None:
            video = self._digest(source.video)
        elif "://" in source.path:
            video = source.path  # what lies there is taken to stay
        else:
            video = self._stamp(source.path)
        # As the processor samples: its own rate counts only where neither is asked for.
        num_frames = processor.num_frames if source.num_frames is None else source.num_frames
        fps = processor.fps if source.num_frames is None and source.fps is None else source.fps
        part = "" if source.start is source.end is None else f" {source.start} to {source.end}"
        return hashlib.sha256(f"{self.fingerprint} {num_frames} {fps} {video}{part}".encode()).hexdigest()

    def _digest(self, video: Any) -> str:
        """Of the content of arrays, pictures and bytes; computed once for each, which must not change afterwards."""
        if id(video) not in self._digests:
            content, form = video, ""
            if not isinstance(video, (bytes, bytearray)):
                content = np.ascontiguousarray(np.asarray(video))
                form = f"{content.shape} {content.dtype}"
            digest = hashlib.sha256(content).hexdigest() + form
            self._digests[id(video)] = (video, digest)  # held, so that its id stays its own
        return self._digests[id(video)][1]

    @staticmethod
    def _stamp(path: str | Path) -> str:
        """Path, bytes and time of change of a file, or of each file of a folder of frames."""
        try:
            status = os.stat(path)
            stamps = [(str(path), status.st_size, status.st_mtime_ns)]
            if stat.S_ISDIR(status.st_mode):
                with os.scandir(path) as files:
                    stamps += sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
        except OSError as error:
            raise SkippedSample(f"{str(path)!r} cannot be read: {error.strerror}.", str(path)) from error
        return repr(stamps)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _has(self, key: str) -> bool:
        """Whether an entry is there and whole; a damaged one is computed again."""
        if key in self._entries or self.folder is None or not (file := self._file(key)).exists():
            return key in self._entries
        try:
            with safe_open(file, "pt"):
                return True
        except SafetensorError:
            return False

    def _load(self, key: str) -> dict[str, Tensor] | None:
        entry = self._entries.get(key)
        if entry is None and self.folder is not None and (file := self._file(key)).exists():
            try:
                entry = load_file(file)
            except SafetensorError as error:
                raise OSError(
                    f"{file} of the feature cache is cut short or damaged ({error}); fill the cache again."
                ) from error
            if self.memory:
                self._entries[key] = entry
        return entry

    def _store(self, key: str, entry: dict[str, Tensor]) -> None:
        if self.memory:
            self._entries[key] = entry
        if self.folder is not None:
            file = self._file(key)
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}")
            save_file(entry, unfinished)
            os.replace(unfinished, file)  # whole or not at all, whoever else writes it


def check_frozen(model) -> None:
    """Raises `ValueError` if something that the visual features depend on is to be trained."""
    trained = [name for name, value in _vision(model) if getattr(value, "requires_grad", False)]
    if trained:
        raise ValueError(
            f"The feature cache keeps what vision encoder and projector give, but {len(trained)} of their tensors are "
            f"to be trained ({trained[0]}, ...); freeze them, or train without the cache."
        )


def fingerprint(model: LinVTForConditionalGeneration, processor: LinVTProcessor) -> str:
    """Of all that decides a frame's visual tokens, but for the frame; reads all weights of the vision encoder once."""
    digest = hashlib.sha256()
    config = model.base.config.to_dict()
    image_processor = processor.image_processor.to_dict()
    for name in ("text_config", "_name_or_path", "auto_map"):  # the last is there once they were saved
        config.pop(name, None)
        image_processor.pop(name, None)
    kind = model.base.device.type
    autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
    settings = [config, image_processor, processor.frame_kwargs, type(model.image_llm).__name__]
    settings.append(autocast)
    digest.update(json.dumps([_FORMAT, transformers.__version__, *settings], sort_keys=True, default=str).encode())
    for name, value in _vision(model):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _vision(model: LinVTForConditionalGeneration) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of an image-LLM outside of its language model."""
    base = model.base
    words = [base.get_decoder(), base.get_input_embeddings(), base.get_output_embeddings()]
    text = {id(value) for part in words if part is not None for value in _tensors(part).values()}
    for name, value in _tensors(base).items():
        if id(value) not in text:
            yield name, value


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _encode(model: LinVTForConditionalGeneration, frames: BatchFeature) -> dict[str, Tensor]:
    """One video's pixels to an entry of the cache."""
    count = int(frames["num_frames"])
    inputs = {n.removeprefix(FRAME_PREFIX): value for n, value in frames.items() if n.startswith(FRAME_PREFIX)}
    with torch.no_grad():
        tokens = model.image_llm.encode_frames(
            model.base, frames["pixel_values_videos"], inputs, count, model.config.frames_per_chunk
        )
        features = features_per_frame(tokens, [count])[0].cpu()
    # Of the vision encoder's further inputs, what tells the frames' shape is asked for later; masks of pixels are not.
    kept = {f"{FRAME_PREFIX}{name}": value for name, value in inputs.items() if value.ndim <= 2}
    entry = {"frame_features": features, "num_frames": frames["num_frames"], **kept}
    entry["frames_num_tokens"] = torch.full((count,), features.shape[1])
    entry["video_durations"] = frames["video_durations"]
    if "frame_times" in frames:
        entry["frame_times"] = frames["frame_times"][0]
    return {name: value.contiguous() for name, value in entry.items()}


class _Reader(Dataset):
    """Videos to what the processor makes of their frames, in a data loader's workers."""

    def __init__(self, processor: LinVTProcessor, videos: list[VideoInput]):
        self.processor = processor
        self.videos = videos

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Tensor] | SkippedSample:
        try:
            return read_frames(self.processor, [self.videos[index]])
        except SkippedSample as error:
            return error


def _same(item: Any) -> Any:
    return item


__all__ = ["FeatureCache", "check_frozen", "fingerprint"]
