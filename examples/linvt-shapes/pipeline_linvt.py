"""The `video-question-answering` pipeline: videos and questions in, answers out."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from transformers import BatchFeature, Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils import logging

from .chat_templates import videos_of, with_videos
from .choice_scores import score_choices
from .encoded_video import EncodedVideo, PixelStream
from .explanation import Explanation, explain
from .video_reading import is_one_video

logger = logging.get_logger(__name__)

_SAMPLING = ("num_frames", "fps", "videos_kwargs")
_STAY = ("pixel_values_videos", "num_frames")


def _identity(video: Any) -> tuple | int:
    """What tells a video from others: of a file its path, time and size; of an object itself, while it is there."""
    if isinstance(video, str | Path) and os.path.isfile(video):
        about = os.stat(video)
        return os.path.abspath(video), about.st_mtime_ns, about.st_size
    return id(video)


def _in_words(sampling: dict) -> str:
    """Whole, where `repr` leaves out the middle of a long array."""
    return json.dumps(sampling, default=lambda value: value.tolist() if hasattr(value, "tolist") else repr(value))


@dataclass
class _Videos:
    """Of a batch, by what tells them apart: all in order, the new ones that are read, and what the one before left."""

    keys: list[tuple]
    streams: dict[tuple, PixelStream | EncodedVideo]
    last: dict[tuple, EncodedVideo]

    @property
    def kept(self) -> set[tuple]:
        """The last, for the next batch: only a file that is as it was is sure to be the same video at another time."""
        return {key for key in self.keys[-1:] if isinstance(key[0], tuple)}


def _check(inputs: dict) -> None:
    if inputs.keys() - {"choices"} not in ({"video", "question"}, {"messages"}):
        raise ValueError(
            f"An input holds {', '.join(map(repr, inputs)) or 'nothing'}; it is a dict with 'video' and 'question', "
            "or with 'messages', and perhaps 'choices', or a chat."
        )
    if "messages" in inputs and not isinstance(inputs["messages"], list | tuple):
        raise ValueError(f"messages are a list, of a chat's turns; got {type(inputs['messages']).__name__}.")
    if not isinstance(question := inputs.get("question", ""), str):
        raise ValueError(f"A question is a text; got {type(question).__name__} {question!r}.")


def _begun(work: Callable[[], dict | None]) -> Future:
    """Of work in a thread that nobody waits for at the end: what it reads from may never give more."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="linvt-ahead", daemon=True).start()
    return future


def _close(coming: Future) -> None:
    if coming.exception() is None and (batch := coming.result()) is not None:
        for stream in batch["videos"].streams.values():
            if isinstance(stream, PixelStream):
                stream.close()


def _times_in(features: dict) -> list[Tensor | None]:
    """Of each video of a sample, [T] seconds."""
    counts = features.get("num_frames", torch.empty(0, dtype=torch.long)).tolist()
    times = features.get("frame_times")
    return [None if times is None else times[video, :count] for video, count in enumerate(counts)]


class VideoQuestionAnsweringPipeline(Pipeline):
    """
    Answers questions about videos with a LinVT model.

    ```python
    answer = pipeline("video-question-answering", model=folder_or_hub_id, trust_remote_code=True)
    answer(video="cat.mp4", question="What does the cat do?")
    answer(video="cat.mp4", question="Where is it?", choices=["indoors", "outdoors"])
    answer([{"video": "a.mp4", "question": "Who?"}, {"video": "b.mp4", "question": "Where?"}], batch_size=2)
    ```

    Each input gives a list of dicts: `{"answer": text}`, one for each returned sequence; with `choices` one for each
    option, best first, with `score`, the options' probabilities (they sum to 1), and `log_likelihood`, the mean over
    the option's tokens of their log-probability after the prompt, from whose softmax the scores come. Where one option
    begins another, as "left" does "left of it", the end of the answer counts as one more token of each. With
    `return_frame_times=True` each dict has `frame_times` too: of each of the input's videos the seconds of the frames
    that were seen, None where nobody knows them.

    A video that stands in a batch several times is encoded once; the one that was asked about last is kept, and if it
    is a file that has not changed, the next question about it starts from there. While a batch is answered, the videos
    of the next are opened and begun to be read.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    MAX_NEW_TOKENS = 256  # ours; for models whose generation config sets no limit

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._last: dict[tuple, EncodedVideo] = {}  # the video that was asked about last, by what it is
        self._state: tuple = ()  # of model and processor, as they were then

    def _sanitize_parameters(
        self,
        num_frames=None,
        fps=None,
        videos_kwargs=None,
        questions=None,
        question_turn=None,
        choices=None,
        progress=None,
        skip_special_tokens=None,
        return_frame_times=None,
        **generate_kwargs,
    ):
        reading = {"num_frames": num_frames, "fps": fps, "videos_kwargs": videos_kwargs}
        reading |= {"questions": questions, "question_turn": question_turn}
        reading = {name: value for name, value in reading.items() if value is not None}
        preprocess = reading if choices is None else {"choices": choices, **reading}
        forward = {**reading, **generate_kwargs}
        if progress is not None:
            forward["progress"] = progress
        postprocess = {"skip_special_tokens": skip_special_tokens, "return_frame_times": return_frame_times}
        return preprocess, forward, {name: value for name, value in postprocess.items() if value is not None}

    def __call__(self, inputs=None, question=None, *, video=None, **kwargs):
        """
        Args:
            inputs: a dict with `video`, `question` and perhaps `choices`; a chat, whose messages hold blocks of type
                "video", or a dict with it as `messages` and perhaps `choices`; a list, generator or dataset of these.
                Or a video, with `question` beside it.
            video, question: one of each, or one question for several videos, or as many of both.
            num_frames, fps: how the videos are sampled, instead of the processor's defaults; with `fps`, `num_frames`,
                or its default, is the most that are read.
            videos_kwargs: further arguments of `read_video`, such as `start` and `end`, seconds, or `on_error`.
            choices: options to choose from.
            questions: False for answers to prompts without words, whose videos are then condensed without a question.
            question_turn: which of a chat's turns conditions its videos: "newest" (default), or "first".
            batch_size: inputs that go through the model together.
            progress: a function that is told, now and then, how many frames are encoded, and of how many.
            return_frame_times: whether an answer says when the frames are that were seen.
            kwargs: for `generate`, such as `max_new_tokens` or a `streamer`.
        """
        if video is None and question is not None:
            inputs, video = None, inputs
        if (video is None) != (question is None):
            raise ValueError("Give both video= and question=; one of them is missing.")
        if video is not None:
            videos = [video] if is_one_video(video) else list(video)
            several = hasattr(question, "__iter__") and not isinstance(question, str)
            questions = list(question) if several else [question] * len(videos)
            if len(videos) == 1 and len(questions) > 1:
                videos = videos * len(questions)
            if len(videos) != len(questions):
                raise ValueError(f"{len(videos)} videos, but {len(questions)} questions; give as many of both.")
            pairs = [{"video": v, "question": q} for v, q in zip(videos, questions, strict=True)]
            inputs = pairs[0] if is_one_video(video) and not several else pairs
        if inputs is None or isinstance(inputs, str) or (isinstance(inputs, (list, tuple)) and not inputs):
            raise ValueError("Nothing to answer: give video= and question=, or a chat.")
        self._forget_if_changed()
        if isinstance(inputs, Iterator):  # of these, the base class knows generators alone
            inputs = (each for each in inputs)
        return super().__call__(inputs, **kwargs)

    def _forget_if_changed(self) -> None:
        """The last video, where it would be encoded otherwise now: models are trained between questions."""
        if (state := (self.model.encoding_state(), self.processor.encoding_state())) != self._state:
            self._last, self._state = {}, state

    def explain(self, video: Any, question: str, **kwargs) -> Explanation:
        """
        Which moments and places of a video the answer to a question was read from.

        Args:
            answer: what is explained; by default what the model answers.
            importance: "uniform", or "gradient": weigh tokens by how much the answer depends on them.
            num_frames, fps, videos_kwargs: as in a call. kwargs: for `generate`.
        """
        return explain(self, video, question, **kwargs)

    # ---- one input ----

    def preprocess(self, inputs, choices=None, **reading):
        if isinstance(inputs, dict):
            _check(inputs)
            choices = inputs.get("choices", choices)
            if (messages := inputs.get("messages")) is None:
                content = [{"type": "video", "video": inputs["video"]}, {"type": "text", "text": inputs["question"]}]
                messages = [{"role": "user", "content": content}]
        else:  # the base class makes a Chat of what looks like one
            messages = getattr(inputs, "messages", inputs)
        texts = isinstance(choices, list | tuple) and all(isinstance(option, str) for option in choices)
        if choices is not None and not (texts and choices):
            raise ValueError(f"choices are a list of texts, at least one; got {choices!r}.")
        if get_worker_info() is None:
            return {"messages": messages, "choices": [choices]}
        # In a process of its own a video is read whole, to be sent to this one.
        return {"features": self._features(messages, **reading), "choices": [choices]}

    def collate(self, items: list[dict]) -> dict:
        return {"items": items, "choices": [choices for item in items for choices in item["choices"]]}

    def get_iterator(
        self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
    ) -> Iterator:
        # The base class pads every tensor as if it were text, which would cut videos; this one collates by meaning.
        dataset = PipelineDataset if hasattr(inputs, "__len__") else PipelineIterator
        loader = DataLoader(
            dataset(inputs, self.preprocess, preprocess_params),
            num_workers=num_workers,
            batch_size=batch_size,
            collate_fn=self.collate,
        )
        batches, sampling = iter(loader), {name: forward_params.get(name) for name in _SAMPLING}
        last = dict(self._last)  # its own: other calls may come between two answers
        known = set(last)

        def begin() -> dict | None:
            if (batch := next(batches, None)) is not None:
                batch["videos"] = self._open(batch["items"], sampling, known, last)
            return batch

        coming = _begun(begin)
        try:
            while (batch := coming.result()) is not None:
                known = batch["videos"].kept
                coming = _begun(begin)
                for answers in self.forward(batch, **forward_params):
                    yield self.postprocess([answers], **postprocess_params)
        finally:  # nobody may ask for the rest
            coming.add_done_callback(_close)

    # ---- the model ----

    def _ensure_tensor_on_device(self, inputs, device):
        # Pixels, counts and shapes of frames stay where they are: the model takes a few frames at a time to its
        # device, and reads counts on the CPU.
        if isinstance(inputs, (dict, BatchFeature)) and "pixel_values_videos" in inputs:
            stay = {name: v for name, v in inputs.items() if name in _STAY or name.startswith("frames_")}
            moved = {name: value for name, value in inputs.items() if name not in stay}
            return BatchFeature({**super()._ensure_tensor_on_device(moved, device), **stay})
        return super()._ensure_tensor_on_device(inputs, device)

    def _forward(
        self,
        model_inputs,
        num_frames=None,
        fps=None,
        videos_kwargs=None,
        questions=None,
        question_turn=None,
        progress=None,
        **generate_kwargs,
    ) -> list:
        """For each input of the batch: the new tokens [R, L] of its R sequences, or its scored choices; and of each
        of its videos the times of its frames."""
        items, choices = model_inputs.get("items", [model_inputs]), model_inputs["choices"]
        videos = model_inputs.get("videos")
        if videos is None:
            sampling = dict(zip(_SAMPLING, (num_frames, fps, videos_kwargs), strict=True))
            last = dict(self._last)
            videos = self._open(items, sampling, set(last), last)
        encoded = iter(self._encode(videos, progress))
        samples, times = [], []
        for item in items:
            sample = item.get("features")
            if sample is None:
                messages = with_videos(item["messages"], encoded)
                sample = self._features(messages, questions=questions, question_turn=question_turn)
                times.append([video.times for video in videos_of(messages)])
            else:
                times.append(_times_in(sample))
            samples.append(self._ensure_tensor_on_device(sample, self.device))
        if any(choices):  # an input's options are a batch of their own
            if not all(choices):
                raise ValueError("In one batch some inputs have choices and some have none; ask them separately.")
            scored = [
                score_choices(self.model, self.tokenizer, dict(sample), options)
                for sample, options in zip(samples, choices, strict=True)
            ]
            return list(zip(scored, times, strict=True))
        features = self.processor.collate(samples)
        length, text = features["input_ids"].shape[1], self.model.config.get_text_config()
        if length > (context := getattr(text, "max_position_embeddings", None) or length):
            logger.warning(f"A prompt takes {length} tokens, and the model reads {context}: its answer means little.")
        sequences = self.model.generate(**features, **self.limited(generate_kwargs))
        sequences = getattr(sequences, "sequences", sequences)[:, features["input_ids"].shape[1] :]
        return list(zip(sequences.unflatten(0, (len(choices), -1)), times, strict=True))

    def limited(self, generate_kwargs: dict) -> dict:
        """Arguments of `generate`, with the longest answer where neither they nor the model say."""
        given = {"max_new_tokens", "max_length", "generation_config"} & generate_kwargs.keys()
        if given or self.model.generation_config.max_new_tokens is not None:
            return generate_kwargs
        return {**generate_kwargs, "max_new_tokens": self.MAX_NEW_TOKENS}

    def _open(self, items: list[dict], sampling: dict, known: set[tuple], last: dict) -> "_Videos":
        """Begins to read a batch's videos, each once, but none of the `known`, which `last` will hold by its turn."""
        videos = [video for item in items for video in videos_of(item.get("messages", ()))]
        keys = [(_identity(video), _in_words(sampling)) for video in videos]
        new = {key: video for key, video in zip(keys, videos, strict=True) if key not in known}
        chunk_size = self.model.config.frames_per_chunk
        streams = self.processor.streams(list(new.values()), **sampling, chunk_size=chunk_size)
        return _Videos(keys, dict(zip(new, streams, strict=True)), last)

    def _encode(self, videos: "_Videos", progress) -> list[EncodedVideo]:
        """All together, while they are read."""
        new = self.model.encode_videos(list(videos.streams.values()), progress)
        encoded = {**videos.last, **dict(zip(videos.streams, new, strict=True))}
        videos.last.clear()
        videos.last.update({key: encoded[key] for key in videos.kept})
        self._last = dict(videos.last)
        return [encoded[key] for key in videos.keys]

    def _features(self, messages: list[dict], **processor_kwargs) -> BatchFeature:
        return self.processor.apply_chat_template(
            messages,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={name: value for name, value in processor_kwargs.items() if value is not None},
        )

    # ---- answers ----

    def postprocess(
        self, model_outputs: list, skip_special_tokens: bool = True, return_frame_times: bool = False
    ) -> list[dict]:
        ((answers, times),) = model_outputs
        if not isinstance(answers, list):
            texts = self.processor.batch_decode(answers, skip_special_tokens=skip_special_tokens)
            answers = [{"answer": text.strip()} for text in texts]
        if not return_frame_times:
            return answers
        frame_times = [seconds if seconds is None else seconds.tolist() for seconds in times]
        return [{**answer, "frame_times": frame_times} for answer in answers]

    def save_pretrained(self, save_directory, **kwargs):
        """Saves a complete folder, processor included."""
        self.model.save_pretrained(save_directory, processor=self.processor, **kwargs)


__all__ = ["VideoQuestionAnsweringPipeline"]
