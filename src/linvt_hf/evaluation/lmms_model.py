"""`lmms_eval --model linvt`: LinVT models as lmms-eval asks them."""

import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages, ChatVideoContent
from tqdm import tqdm

from ..asking.answers import Answer, answer_all, in_one_line
from ..asking.loading import load_pipeline
from .parsing import letters_in

# Of a task's generation_kwargs, what `generate` and the processor know; the others are other models'.
_GENERATION = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p", "top_k", "num_frames", "fps")


@dataclass(frozen=True)
class _Asked:
    """One request: a chat, or why there is none; and how to answer it."""

    task: str
    split: str
    doc_id: int
    messages: list[dict]
    settings: dict
    until: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    fault: str | None = None

    def media(self, kind: str) -> list[Any]:
        blocks = (block for message in self.messages for block in message["content"])
        return [block[kind] for block in blocks if block["type"] == kind]

    def words(self) -> str:
        """The newest that the user says."""
        user = [message["content"] for message in self.messages if message["role"] == "user"]
        return "\n".join(block["text"] for block in user[-1] if block["type"] == "text") if user else ""

    def inputs(self) -> dict:
        return {"messages": self.messages, **({"choices": list(self.choices)} if self.choices else {})}


class LinVT(lmms):
    """
    A chat model of lmms-eval's: `lmms_eval --model linvt --model_args pretrained=FOLDER,num_frames=32 --tasks ...`.

    Questions on one video are asked one after the other and encode it once; `batch_size` of them go through the model
    together. With `accelerate launch --num_processes N -m lmms_eval` each process has a GPU and asks its share; on CPU
    that is `ACCELERATE_USE_CPU=1 torchrun --nproc-per-node N -m lmms_eval`.

    A question that cannot be answered, for instance because its video cannot be read, gets the answer "", which is
    wrong; `record` tells the reason, and so does a line in the log.

    Args:
        pretrained: LinVT model, or adapters from training: a Hub id or a folder.
        device: by default a GPU if there is one, each process another; "auto" for all there is.
        dtype, quantize, base: see `linvt_hf.asking.loading.load_pipeline`.
        batch_size: questions at a time.
        num_frames, fps: how videos are sampled; else what a task says (in generation_kwargs), or the model's default.
        max_new_tokens: instead of the tasks' own.
        letters: of questions whose prompt has options A., B., ...: "generate" the answer, or choose the letter of the
            greatest "likelihood".
        system_prompt: a text, or a file that holds it.
        record: JSONL file that gets a line for each answer, when it is there: task, split, doc_id, question, videos,
            frame_times (seconds of the frames that were seen), answer, error, log_likelihoods, made_with (the model
            and settings). What it holds already, made with the same, is not asked again, unless it had no answer.
            With several processes each writes a file of its own, RECORD.0, RECORD.1, ..., and reads all of them.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        quantize: Literal["4bit", "8bit"] | None = None,
        base: str | None = None,
        batch_size: int | str = 1,
        num_frames: int | None = None,
        fps: float | None = None,
        max_new_tokens: int | None = None,
        letters: Literal["generate", "likelihood"] = "generate",
        system_prompt: str | None = None,
        record: str | None = None,
        max_batch_size: int | None = None,
        **unknown,
    ):
        super().__init__()
        if unknown:
            raise ValueError(f"--model_args has {', '.join(unknown)}, which --model linvt does not know.")
        if letters not in ("generate", "likelihood"):
            raise ValueError(f"letters is {letters!r}; it is 'generate' or 'likelihood'.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if (started := int(os.environ.get("WORLD_SIZE", 1))) != self._world_size:
            raise ValueError(
                f"{started} processes were started, but accelerate knows of {self._world_size}; on CPUs it needs "
                "ACCELERATE_USE_CPU=1 in the environment."
            )
        if device in (None, "cuda") and torch.cuda.is_available():
            device = f"cuda:{self.accelerator.local_process_index}"
        self.pipeline = load_pipeline(pretrained, device=device, dtype=dtype, quantize=quantize, base=base)
        self.loaded = {"pretrained": str(pretrained), "base": base, "dtype": dtype, "quantize": quantize}
        self.batch_size = int(batch_size)
        self.sampling = {"num_frames": num_frames, "fps": fps}
        self.max_new_tokens = max_new_tokens
        self.letters = letters
        self.system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else None
        self.record = None if record is None else Path(f"{record}.{self._rank}" if self._world_size > 1 else record)
        self.known = (
            {} if record is None else {_key(line): line for line in read_record(record) if line["error"] is None}
        )

    @property
    def device(self) -> torch.device:
        return self.accelerator.device  # of what processes tell each other

    def clean(self) -> None:
        self.pipeline = None
        super().clean()

    # ---- what is asked ----

    def _asked(self, request: Instance) -> _Asked:
        """Of a request for a text."""
        _, doc_to_messages, settings, doc_id, task, split = request.args
        return self._chat(task, split, doc_id, doc_to_messages, settings)

    def _chat(self, task: str, split: str, doc_id: int, say: Callable, settings: dict) -> _Asked:
        until = settings.get("until") or []
        until = (until,) if isinstance(until, str) else tuple(until)
        about = {"task": task, "split": split, "doc_id": doc_id, "settings": self._settings(settings), "until": until}
        try:
            said = say(self.task_dict[task][split][doc_id])
            said = self._apply_system_prompt(said, self.system_prompt)
            messages = [
                {"role": message.role, "content": [_block(content) for content in message.content]}
                for message in ChatMessages(messages=said).messages
            ]
        except (SystemExit, Exception) as error:  # tasks end the process where a file is not there
            return _Asked(**about, messages=[], fault=in_one_line(error))
        asked = _Asked(**about, messages=messages)
        if self.letters == "likelihood" and (letters := letters_in(asked.words())):
            return _Asked(**about, messages=messages, choices=tuple(letters))
        return asked

    def _settings(self, given: dict) -> dict:
        settings = {name: given[name] for name in _GENERATION if given.get(name) is not None}
        settings.update({name: value for name, value in self.sampling.items() if value is not None})
        if self.max_new_tokens is not None:
            settings["max_new_tokens"] = self.max_new_tokens
        temperature = settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0)
        settings["do_sample"] = temperature > 0 and settings.get("do_sample", True)
        if not settings["do_sample"]:
            for name in ("temperature", "top_p", "top_k"):
                settings.pop(name, None)
        return settings

    # ---- answers ----

    def generate_until(self, requests: list[Instance]) -> list[str]:
        asked = [self._asked(request) for request in requests]
        texts = []
        for each, answer in zip(asked, self._answers(asked), strict=True):
            ends = [place for end in each.until if end and (place := answer.text.find(end)) >= 0]
            texts.append(answer.text[: min(ends)].rstrip() if ends else answer.text)
        return texts

    def _answers(self, asked: list[_Asked]) -> list[Answer]:
        """In order. Asked together is what is generated alike, and questions on one video one after another."""
        groups = defaultdict(list)
        answers: dict[int, Answer] = {}
        for number, each in enumerate(asked):
            line = self.known.get((each.task, each.split, each.doc_id, each.words()))
            if line is not None and line["made_with"] == self._made_with(each):
                answers[number] = Answer(line["answer"], log_likelihoods=line["log_likelihoods"])
            else:
                groups[json.dumps([each.settings, bool(each.choices)]), each.fault is None].append(number)
        progress = tqdm(total=len(asked), initial=len(answers), disable=self.rank != 0, desc="Model Responding")
        for (_, can_be_asked), numbers in groups.items():
            numbers.sort(key=lambda number: [str(video) for video in asked[number].media("video")])
            each = [asked[number] for number in numbers]
            if can_be_asked:
                found = answer_all(
                    self.pipeline, [one.inputs() for one in each], batch_size=self.batch_size, **each[0].settings
                )
            else:
                found = (Answer(error=one.fault) for one in each)
            for number, one, answer in zip(numbers, each, found, strict=True):
                answers[number] = answer
                self._note(one, answer)
                progress.update()
        progress.close()
        return [answers[number] for number in range(len(asked))]

    def _made_with(self, asked: _Asked) -> dict:
        """All that an answer depends on beside the question, as JSON holds it."""
        made_with = {**self.loaded, "system_prompt": self.system_prompt, **asked.settings}
        return {name: value for name, value in made_with.items() if value is not None} | (
            {"choices": list(asked.choices)} if asked.choices else {}
        )

    def _note(self, asked: _Asked, answer: Answer) -> None:
        if answer.error is not None:
            tqdm.write(f"linvt: {asked.task} {asked.doc_id} has no answer: {answer.error}")
        if self.record is not None:
            line = {
                "task": asked.task,
                "split": asked.split,
                "doc_id": asked.doc_id,
                "question": asked.words(),
                "videos": [str(video) for video in asked.media("video")],
                "frame_times": [times and [round(time, 3) for time in times] for times in answer.frame_times],
                "answer": answer.text,
                "error": answer.error,
                "log_likelihoods": answer.log_likelihoods,
                "made_with": self._made_with(asked),
            }
            with self.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        raise NotImplementedError(
            "lmms-eval asks chat models for texts only; --force_simple makes it ask for likelihoods of options."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("--model linvt answers tasks of one round only.")


class LinVTSimple(LinVT):
    """
    The same for `--force_simple`, which tasks with output_type multiple_choice need, such as `egoschema_subset_mcppl`:
    their options are scored, each by minus the mean log-probability of its tokens, of which lmms-eval takes the least.
    """

    is_simple = True

    def _asked(self, request: Instance) -> _Asked:
        context, settings, doc_to_visual, doc_id, task, split = request.args
        return self._chat(task, split, doc_id, lambda doc: _one_turn(doc_to_visual(doc), context), settings)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """
        A pair for each: the loss, and None for lmms-eval's second value, whether it is what the model would say of
        itself. In a wrapper: lmms-eval 0.7.3 makes a text of a bare pair.
        """
        options: dict[tuple, list[str]] = defaultdict(list)
        asked: dict[tuple, _Asked] = {}
        places = []
        for request in requests:
            context, option, doc_to_visual, doc_id, task, split = request.args
            if callable(option):
                option = option(self.task_dict[task][split][doc_id])
            key = (task, split, doc_id, context)
            if key not in asked:
                visuals = lambda doc, see=doc_to_visual, text=context: _one_turn(see(doc), text)  # noqa: E731
                asked[key] = self._chat(task, split, doc_id, visuals, {})
            options[key].append(str(option).strip())
            places.append((key, options[key][-1]))
        with_options = [
            _Asked(**{**vars(each), "choices": tuple(dict.fromkeys(options[key]))}) for key, each in asked.items()
        ]
        answers = dict(zip(asked, self._answers(with_options), strict=True))
        worst = -float("inf")  # of the options of a question without an answer
        losses = (-(answers[key].log_likelihoods or {}).get(option, worst) for key, option in places)
        return [GenerationResult(text=(loss, None)) for loss in losses]


def read_record(record: str | Path) -> list[dict]:
    """
    The answers in a record, of however many processes wrote it; of a question that was asked again the last one, of a
    line that a killed process left unfinished nothing.
    """
    lines: dict[tuple, dict] = {}
    record = Path(record)
    for file in [record, *sorted(record.parent.glob(f"{record.name}.*"))]:
        for text in file.read_text(encoding="utf-8").split("\n") if file.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if _key(line) not in lines or line["error"] is None:
                lines[_key(line)] = line
    return list(lines.values())


def _key(line: dict) -> tuple:
    return line["task"], line["split"], line["doc_id"], line["question"]


def _one_turn(visuals: list, text: str) -> list[dict]:
    def block(visual) -> dict:
        kind = "image" if hasattr(visual, "convert") else "video"  # a PIL image, or a path
        return {"type": kind, "url": visual}

    return [{"role": "user", "content": [*map(block, visuals or []), {"type": "text", "text": text}]}]


def _block(content) -> dict:
    """A block of lmms-eval's as the processor takes it."""
    if content.type == "text":
        return {"type": "text", "text": content.text}
    if content.type not in ("image", "video"):
        raise ValueError(f"a message holds {content.type}, which the model cannot take")
    if isinstance(content, ChatVideoContent):
        part = content.start_time is not None or content.end_time is not None
        if part or (isinstance(content.url, dict) and {"video_start", "video_end"} & content.url.keys()):
            raise ValueError("a message holds a part of a video, from a time to another, which is not read yet")
    return {"type": content.type, content.type: content.url}
