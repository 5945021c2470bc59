"""LinVTProcessor: prompts, images, videos and questions to the tensors a LinVT model takes."""

import inspect
import re
from functools import lru_cache
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput

from .chat_templates import VIDEO_TOKEN, blocks_of, turn_marks, users_words, with_times
from .processing_blip3 import Blip3Processor
from .processing_molmo import MolmoProcessor
from .processing_videos import VideoProcessing, cat_padded

OWN_PROCESSORS = {processor.__name__: processor for processor in (Blip3Processor, MolmoProcessor)}

# How each text input is padded in a batch; input_ids by the tokenizer's own padding token.
_TEXT_PADDING = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0, "labels": -100}


class LinVTProcessor(ProcessorMixin, VideoProcessing):
    """
    Texts, images and videos to model inputs. Images and text go through the base's own processor; a video's frames go
    through the base's image processor, one picture each, and its placeholder in the prompt becomes M video tokens.

    Args:
        image_processor, tokenizer, chat_template: the base's, with the video token added.
        base_processor: the base's processor class in transformers and its own settings, as
            `{"processor_class": "LlavaProcessor", "patch_size": 14, ...}`. None for a base that has none: then texts
            and videos work, images do not.
        video_token: placeholder of a video in a prompt.
        num_video_tokens: M, tokens that a video takes in the prompt; the model's `config.num_video_tokens`.
        num_frames: frames read from each video, at the centres of as many equal stretches (ours: 32); None for all.
        fps: instead, frames a second; then `num_frames` is the most that are read.
        frame_kwargs: arguments of `image_processor` for a video's frames.
        frame_inputs: what of its output, beside the pixels, the base's vision encoder needs.
        token_types: whether the base's attention depends on `token_type_ids`; a prompt without images is of type 0.
        answer_token_type: then the type of an answer that is learned.
        times_in_prompt: what a prompt says of each video that has times: "duration", or "frames" for when each frame
            is, too; None for nothing (ours). LinVT's tokens carry time as well; this says it in words.
        time_forms: how it says that, for both: see `chat_templates.with_times`.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        base_processor: dict | None = None,
        video_token: str = VIDEO_TOKEN,
        num_video_tokens: int = 64,
        num_frames: int | None = 32,
        fps: float | None = None,
        frame_kwargs: dict | None = None,
        frame_inputs: list[str] | None = None,
        token_types: bool = False,
        answer_token_type: int = 0,
        times_in_prompt: Literal["duration", "frames"] | None = None,
        time_forms: dict[str, dict[str, str]] | None = None,
    ):
        self.base_processor = base_processor
        self.video_token = video_token
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        self.num_video_tokens = num_video_tokens
        if (num_frames is not None and num_frames < 1) or (fps is not None and fps <= 0):
            raise ValueError(f"num_frames must be at least 1 and fps above 0; got {num_frames} and {fps}.")
        self.num_frames = num_frames
        self.fps = fps
        self.frame_kwargs = frame_kwargs or {}
        self.frame_inputs = list(frame_inputs or [])
        self.token_types = token_types
        self.answer_token_type = answer_token_type
        self.time_forms = time_forms or {}
        if times_in_prompt is not None and times_in_prompt not in self.time_forms:
            known = ", ".join(map(repr, self.time_forms)) or "none: the processor has no time_forms"
            raise ValueError(f"times_in_prompt is {times_in_prompt!r}; known are {known}.")
        self.times_in_prompt = times_in_prompt
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: None = None,
        *,
        questions: str | list[str] | bool | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        do_sample_frames: bool = True,
        videos_kwargs: dict | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: as the base's processor takes them.
            text: one prompt or several; each video stands in it as one `video_token`.
            videos: one video or several, in the order of their placeholders, or one list of videos for each prompt. A
                video is whatever `read_video` takes: a path, a URL, bytes, a file object, a uint8 array or tensor
                [T, H, W, 3], a list of PIL images or of image paths, a folder of images; or an
                `EncodedVideo` or its file.
            questions: what conditions each prompt's videos, all of a prompt's videos alike. `apply_chat_template`
                gives the words of the newest user turn. By default the same is found in the prompt (see
                `question_of`). False for no question.
            num_frames, fps: instead of the processor's defaults; with `fps`, `num_frames` is the most that are read.
                `do_sample_frames=False` keeps every frame.
            videos_kwargs: the same three as a dict, as transformers' processors take them, and further arguments of
                `read_video` for files, such as `start` and `end`.
            kwargs: for the base's processor, such as `padding` (several prompts are padded by default).

        Returns a `BatchFeature` with the base's own entries and, for videos, `pixel_values_videos`, `num_frames` [V],
        `frame_times` [V, max T] in seconds, `question_ids` and `question_mask` [V, L], and `frames_*`; of encoded
        videos `encoded_videos`, a list, instead of pixels.

        Raises `ValueError` when placeholders and videos do not match, or when a question has no words.
        """
        if audio is not None:
            raise ValueError("LinVT reads no audio; leave it out.")
        if images is None and text is None and videos is None:
            raise ValueError("Give text, images or videos; all three are missing.")
        if (kwargs.get("return_tensors") or "pt") != "pt":
            raise ValueError(
                f"LinVT works on torch tensors; return_tensors='{kwargs['return_tensors']}' is not there."
            )
        kwargs["return_tensors"] = "pt"
        sampling = self._sampling(num_frames, fps, do_sample_frames, videos_kwargs)
        texts = [text] if isinstance(text, str) else None if text is None else list(text)
        per_text = [prompt.count(self.video_token) for prompt in texts or ()]
        videos = self._flat_videos(videos, per_text if texts is not None else None)

        inputs = {}
        frames = self._video_inputs(videos, sampling) if videos else {}
        if texts is not None or images is not None:
            inputs.update(self._text_and_images(texts and self.with_video_tokens(texts, frames), images, kwargs))
        if videos:
            frames.pop("video_durations", None)
            inputs.update(frames)
            if questions is not False and (texts is not None or questions is not None):
                inputs.update(self._questions(texts, questions, per_text, len(videos)))
        return BatchFeature(inputs)

    def apply_chat_template(self, conversation, *args, processor_kwargs: dict | None = None, **kwargs):
        """
        `ProcessorMixin.apply_chat_template`, where a video in a message needs nothing further. With `tokenize=True`
        the newest user turn that has words is the question for all videos of its conversation, so that their tokens
        change from turn to turn; with `question_turn="first"` among `processor_kwargs` the first one is, and they
        stay.
        """
        batch = conversation if conversation and isinstance(conversation[0], (list, tuple)) else [conversation]
        videos = [block for messages in batch for turn in messages for block in blocks_of(turn, "video")]
        if kwargs.get("tokenize"):
            processor_kwargs = dict(processor_kwargs or {})
            if videos and kwargs.get("return_assistant_tokens_mask"):
                raise ValueError(
                    "return_assistant_tokens_mask does not count a video's tokens; find the answers by the template's "
                    "own marks, or leave it out."
                )
            turn = processor_kwargs.pop("question_turn", "newest")
            if "questions" not in kwargs:
                processor_kwargs.setdefault("questions", [users_words(messages, turn) for messages in batch])
        return super().apply_chat_template(conversation, *args, processor_kwargs=processor_kwargs, **kwargs)

    # ---- text and images: the base's own way ----

    def _text_and_images(self, texts: list[str] | None, images, kwargs: dict) -> BatchFeature:
        if texts is not None and len(texts) > 1:
            kwargs.setdefault("padding", True)
        if images is None:
            kwargs.pop("images_kwargs", None)
            text_kwargs = kwargs.pop("text_kwargs", {})
            inputs = self.tokenizer(texts, **{**kwargs, **text_kwargs})
            if self.token_types:
                inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
            return inputs
        if self.base_processor is None:
            raise ValueError(
                "This base has no processor in transformers that takes images; only texts and videos work."
            )
        processor = self.image_text_processor()
        nested = (
            texts is not None and len(texts) > 1 and isinstance(images, (list, tuple)) and len(images) == len(texts)
        )
        # Any other padding than to the longest is the processor's to do.
        nested = nested and kwargs["padding"] in (True, "longest") and "text_kwargs" not in kwargs
        if nested and all(isinstance(group, (list, tuple)) for group in images) and not all(images):
            # One by one: some processors write every prompt of a batch otherwise once one of them has an image.
            kwargs["padding"] = False  # collate pads
            pairs = zip(texts, images, strict=True)
            return self.collate(
                [self._text_and_images([one], [group] if group else None, dict(kwargs)) for one, group in pairs]
            )
        return processor(images=images, text=texts, **kwargs)

    def image_text_processor(self) -> ProcessorMixin:
        """The base's own processor for text and images, around this one's tokenizer and image processor."""
        settings = dict(self.base_processor)
        name = settings.pop("processor_class")
        processor_class = processor_class_of(name)
        if processor_class is None:
            raise ValueError(f"transformers {transformers.__version__} has no {name}, which this base's images need.")
        if "video_processor" in inspect.signature(processor_class.__init__).parameters:
            processor_class, settings["video_processor"] = _without_video_processor(processor_class), None
        return processor_class(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            **settings,
        )

    def with_video_tokens(self, texts: list[str], frames: dict[str, Tensor]) -> list[str]:
        """Prompts with M tokens for each video, and what is said of its times; `frames` as `_frames` gives them."""
        if self.times_in_prompt is not None and frames:
            texts = with_times(texts, frames, self.video_token, self.time_forms[self.times_in_prompt])
        return [text.replace(self.video_token, self.video_token * self.num_video_tokens) for text in texts]

    # ---- batches ----

    def collate(self, features: list[BatchFeature]) -> BatchFeature:
        """
        Joins single samples into a batch: prompts are padded on the tokenizer's side, videos and images follow one
        another. What samples without a video lack is left out for them.
        """
        tensors = (value for sample in features for name, value in sample.items() if name != "encoded_videos")
        if not all(isinstance(value, Tensor) for value in tensors):
            raise ValueError("collate joins the processor's outputs, tensors all; a sample holds something else.")
        batch = {}
        for name in dict.fromkeys(name for sample in features for name in sample):
            values = [sample[name] for sample in features if name in sample]
            if name in _TEXT_PADDING:
                fill = self.tokenizer.pad_token_id or 0 if name == "input_ids" else _TEXT_PADDING[name]
                # A sample without token types has text only, type 0; one without labels has nothing to learn.
                default = _TEXT_PADDING[name]
                rows = [
                    row
                    for sample in features
                    for row in sample.get(name, torch.full_like(sample["input_ids"], default))
                ]
                batch[name] = pad_sequence(
                    rows, batch_first=True, padding_value=fill, padding_side=self.tokenizer.padding_side
                )
            elif name in ("frame_times", "question_ids", "question_mask"):  # one row a video, also for those without
                rows = [row for sample in features for row in _rows_per_video(sample, name)]
                batch[name] = pad_sequence(rows, batch_first=True)
            elif name == "encoded_videos":
                batch[name] = [video for videos in values for video in videos]
            else:
                batch[name] = cat_padded(values)
        return BatchFeature(batch)

    # ---- questions ----

    def _questions(self, texts, questions, per_text: list[int], num_videos: int) -> dict[str, Tensor]:
        """Token ids of what each video is asked, padded on the right."""
        if questions is None:
            questions = [self.question_of(prompt) for prompt in texts]
        elif isinstance(questions, str):
            questions = [questions] * (len(texts) if texts is not None else num_videos)
        if texts is not None:
            if len(questions) != len(texts):
                raise ValueError(f"{len(texts)} prompts, but {len(questions)} questions; give one question a prompt.")
            questions = [question for question, n in zip(questions, per_text, strict=True) for _ in range(n)]
        if any(not question.strip() for question in questions):
            raise ValueError(
                "A question has no words, and the question decides what is kept of a video; ask something, or pass "
                "questions=False to condense the video without one."
            )
        ids = [torch.tensor(self.tokenizer(question, add_special_tokens=False)["input_ids"]) for question in questions]
        words = [torch.ones(len(row), dtype=torch.bool) for row in ids]
        return {
            "question_ids": pad_sequence(ids, batch_first=True),
            "question_mask": pad_sequence(words, batch_first=True),
        }

    def question_of(self, prompt: str) -> str:
        """
        The words of a prompt's last user turn, without placeholders and markup, found by what the chat template writes
        around a user's words; a prompt without those marks counts as a whole. A text that itself holds the marks of a
        template in plain words ("USER:") can mislead this: give `questions` then, or messages.
        """
        header, footer = self._turn_marks()
        if header and header in prompt:
            prompt = prompt[prompt.rindex(header) + len(header) :]
        if footer and footer in prompt:
            prompt = prompt[: prompt.index(footer)]
        markup = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab(), self.video_token} - {""}
        pattern = "|".join(map(re.escape, sorted(markup, key=len, reverse=True)))
        return re.sub(rf"\s*(?:{pattern})\s*", " ", prompt).strip()

    def _turn_marks(self) -> tuple[str, str]:
        """What this processor's chat template writes right before and right after a user's words."""
        template = self.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return turn_marks(template, tuple(self.tokenizer.special_tokens_map.items())) if template else ("", "")

    @property
    def model_input_names(self) -> list[str]:
        base = super() if self.base_processor is None else self.image_text_processor()
        frames = ["pixel_values_videos", *(f"frames_{name}" for name in self.frame_inputs)]
        videos = ["num_frames", "frame_times", "question_ids", "question_mask"]
        return [*base.model_input_names, *frames, *videos]


def processor_class_of(name: str | None) -> type[ProcessorMixin] | None:
    """A processor's class by name: one of ours, for bases that transformers lacks, or of transformers."""
    return OWN_PROCESSORS.get(name) or getattr(transformers, name or "", None)


@lru_cache(maxsize=16)
def _without_video_processor(processor_class: type) -> type:
    """The processor class, content with no video processor: the base's needs torchvision and would not be used."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument is not None:
            return processor_class.check_argument_for_proper_class(self, argument_name, argument)

    return type(
        processor_class.__name__,
        (processor_class,),
        {"check_argument_for_proper_class": check_argument_for_proper_class},
    )


def _rows_per_video(sample: BatchFeature, name: str) -> list[Tensor]:
    """A sample's rows of `name`, one a video; evenly spaced times or no question where it has none."""
    counts = sample["num_frames"].tolist() if "num_frames" in sample else []
    if name not in sample:
        if name == "frame_times":
            return [torch.arange(count, dtype=torch.float32) for count in counts]
        return [torch.zeros(0, dtype=torch.bool if name == "question_mask" else torch.long) for _ in counts]
    return list(sample[name])


__all__ = ["LinVTProcessor"]
