"""
A tiny image-LLM, of InternVL's architecture or another of the six, trained from nothing on the pictures of `shapes`,
and on texts. It sees no video.

It takes no more than two CPU cores because its targets are dense: see `samples`. While it trains, a head on its visual
tokens names what lies in each token's part of the picture.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..training.labels import IGNORED
from .bases import INTERNVL2, VOCABULARY, Base
from .questions import RANKS, ask, ask_about_pictures
from .samples import (
    CONTENTS,
    SIDE,
    Sample,
    album,
    as_file,
    ask_about,
    contents,
    of_pictures,
    pictures_sample,
    story_sample,
)
from .world import draw, make_scene

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}IMAGE{% elif block['type'] == 'text' %}{{ block['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_template(base: Base) -> str:
    return CHAT_TEMPLATE.replace("IMAGE", base.block.replace("\n", "\\n"))


def build_tokenizer(base: Base = INTERNVL2) -> PreTrainedTokenizerFast:
    """Byte-level BPE that reads any text, and the words of `shapes` as one token each."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *dict.fromkeys(base.tokens.values())]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,  # room for the video token, and more that somebody may want to add
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_words(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=base.tokens,
        chat_template=chat_template(base),
    )


def _words() -> Iterator[str]:
    for kind in ("image", "video", "long"):
        for number in range(400):
            scene = make_scene(kind, "train", number)
            questions = ask(scene, Random(number))
            if kind == "image":
                pictures = [scene, *album(scene, Random(number))]
                questions += ask_about_pictures(pictures[: len(RANKS)], Random(number))
            for question in questions:
                yield from (question.text, question.answer, "user\n", "assistant\n", "system\n")


# ---- pretraining ----


class ContentsHead(nn.Linear):
    """
    Names what lies in each visual token's part of the picture; trains the encoder, and is thrown away after it.

    Its loss keeps tokens small, too, so that one of an empty part is nearly nothing: without that those were twice as
    long as the others, and hid them in any average.
    """

    def __init__(self, width: int):
        super().__init__(width, CONTENTS)

    def loss(self, tokens: Tensor, target: Tensor) -> Tensor:  # [P, 16, D], [P, 16, contents]
        named = F.binary_cross_entropy_with_logits(self(tokens), target, reduction="none").sum(dim=-1).mean()
        return named + 0.01 * tokens.square().mean()


def pretrain(
    base: Base = INTERNVL2,
    vision_steps: int = 2000,
    steps: int = 3500,
    batch: int = 32,
    rate: float = 2e-3,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """
    First the vision encoder and the projector, by what lies where; then all of it, by questions, descriptions and
    stories. No scene is seen twice. On a GPU if there is one; in bfloat16 where the device has it.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(base)
    model = base.build(tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    head = ContentsHead(model.config.text_config.hidden_size).to(model.device)
    language = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    vision = [p for p in model.parameters() if id(p) not in language]
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    scenes = (make_scene("image", "train", number) for number in itertools.count())
    stories = (make_scene("video", "train", number) for number in itertools.count(10**6))  # no video shows them
    random = Random(seed)
    model.train()

    # In bfloat16 on a CPU, PyTorch's own fused attention takes more than twice as long to train as this.
    model.set_attn_implementation("eager")

    def views() -> list[tuple[np.ndarray, np.ndarray]]:
        several = list(itertools.islice(scenes, batch))
        drawn = np.stack([as_file(draw(scene, 0), random) for scene in several])
        return [(drawn, np.stack([contents(scene) for scene in several]))]

    def seen(pixels: np.ndarray, target: np.ndarray, of: Callable = base.visual_tokens) -> Tensor:
        return head.loss(of(model, as_pixels(pixels, model.device)), torch.from_numpy(target).to(model.device))

    def prompts(step: int) -> list[tuple[list[Sample], int, int]]:
        told = batch // 4
        # To find a thing in one picture comes first: with half of them albums from the start, 2,000 steps did not do.
        albums = 0.0 if step < 0.4 * steps else 0.6
        samples = [
            pictures_sample(scene, random, tokenizer, albums, base) for scene in itertools.islice(scenes, batch - told)
        ]
        samples += [story_sample(scene, random, tokenizer) for scene in itertools.islice(stories, told)]
        samples.sort(key=lambda sample: len(sample.ids))
        labels = sum(label != IGNORED for sample in samples for label in sample.labels)
        pictures = sum(len(sample.pixels) for sample in samples)
        parts = (samples[: batch // 2], samples[batch // 2 :])  # those of like length hold little padding
        return [(part, labels, pictures) for part in parts]

    def answered(samples: list[Sample], labels: int, pictures: int) -> Tensor:
        inputs, tokens = collate(samples, model, base)
        loss = model(**inputs, num_items_in_batch=labels).loss
        if len(tokens) == 0:
            return loss
        target = torch.from_numpy(np.concatenate([sample.contents for sample in samples])).to(model.device)
        return loss + 0.25 * len(tokens) / pictures * head.loss(tokens, target)

    def batches() -> Iterator[list[tuple]]:
        yield from (views() for _ in range(vision_steps))
        yield from (prompts(step) for step in range(steps))

    drawn = _drawn(batches(), model.device.type == "cuda")
    encoder_steps = 0 if base.encoder is None else 3 * vision_steps // 10
    encoded = partial(seen, of=base.encoder)
    _run(drawn, encoded, [*vision, *head.parameters()], encoder_steps, rate, log, "encoder")
    _run(drawn, seen, [*vision, *head.parameters()], vision_steps - encoder_steps, rate, log, "vision")
    _run(drawn, answered, [*model.parameters(), *head.parameters()], steps, rate / 2, log, "all")
    model.set_attn_implementation("sdpa")
    return model.eval(), tokenizer


class _Stream(IterableDataset):
    def __init__(self, items: Iterator):
        self.items = items

    def __iter__(self) -> Iterator:
        return self.items


def _drawn(batches: Iterator, ahead: bool) -> Iterator:
    """Drawn by another process if `ahead`: that takes as long as a GPU takes to learn from them."""
    return iter(DataLoader(_Stream(batches), batch_size=None, collate_fn=list, num_workers=int(ahead)))


def as_pixels(pictures: np.ndarray, device: torch.device) -> Tensor:  # uint8 [P, 64, 64, 3] -> -1..1, [P, 3, 64, 64]
    return torch.tensor(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def collate(samples: list[Sample], model, base: Base = INTERNVL2) -> tuple[dict[str, Tensor], Tensor]:
    """The model's inputs, and the visual tokens among them, [P, 16, D]."""
    length = math.ceil(max(len(sample.ids) for sample in samples) / 16) * 16  # few lengths: oneDNN compiles for each
    ids, labels, block = (torch.full((len(samples), length), value) for value in (0, IGNORED, -1))
    for row, sample in enumerate(samples):
        n = len(sample.ids)
        ids[row, :n], labels[row, :n] = torch.tensor(sample.ids), torch.tensor(sample.labels)
        block[row, :n] = torch.tensor(sample.block)
    seen = (block[:, None] == block[:, :, None]) | (block[:, None] == 0)  # [B, S, S]: queries, keys
    seen = seen.tril()
    ids, labels, seen = ids.to(model.device), labels.to(model.device), seen.to(model.device)
    embeds = model.get_input_embeddings()(ids)
    tokens = embeds.new_zeros(0, SIDE**2, embeds.shape[-1])
    if any(len(sample.pixels) for sample in samples):
        pictures = np.concatenate([sample.pixels for sample in samples])
        tokens = base.visual_tokens(model, as_pixels(pictures, model.device))
        embeds = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], tokens)
    inputs = {
        "inputs_embeds": embeds,
        "labels": labels,
        # To be added to logits: eager attention would add a mask of booleans as ones and zeros, and hide nothing.
        "attention_mask": embeds.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None],
        "position_ids": seen.sum(dim=-1) - 1,  # as if no other question stood between
    }
    return inputs, tokens


def _run(
    batches: Iterator[list[tuple]],
    loss_of: Callable[..., Tensor],
    parameters: list[nn.Parameter],
    steps: int,
    rate: float,
    log: Callable[[str], None],
    name: str,
) -> None:
    """Steps down the sum of `loss_of(*part)` over the parts of a batch, of which every step takes a new one."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / max(steps, 1)))
    )
    device = parameters[0].device.type
    able = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    half = torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or able.get("avx512_bf16", False))
    started = time.monotonic()
    for step in range(1, steps + 1):
        total = 0.0
        for part in next(batches):
            with half:
                loss = loss_of(*part)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            log(f"{name} step {step}/{steps}: loss {total:.3f}, {time.monotonic() - started:.0f} s")


@torch.no_grad()
def evaluate(model, tokenizer, base: Base = INTERNVL2, scenes: int = 200) -> dict[str, float]:
    """Share of answers that greedy decoding would give word for word, by kind of question."""
    right: dict[str, list[bool]] = {}
    for number in range(scenes):
        random = Random(number)
        scene = make_scene("image", "validation", number)
        several = album(scene, random)
        for pictures, questions in (([scene], ask(scene, random)), (several, ask_about_pictures(several, random))):
            sample = of_pictures([draw(picture, 0) for picture in pictures], pictures, tokenizer, base)
            ask_about(sample, questions, tokenizer)
            inputs, _ = collate([sample], model, base)
            length = len(sample.ids)  # after it comes padding
            labels = inputs.pop("labels")[0, 1:length]
            wrong = (model(**inputs).logits[0, : length - 1].argmax(-1) != labels) & (labels != IGNORED)
            wrong = wrong.cpu()
            blocks = torch.tensor(sample.block[1:])
            for block, question in enumerate(questions, 1):
                right.setdefault(question.kind, []).append(not wrong[blocks == block].any())
    return {kind: round(sum(ones) / len(ones), 3) for kind, ones in right.items()}


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, base: Base = INTERNVL2) -> None:
    """A folder in transformers' own layout, with image processor and processor, that `linvt wrap` takes."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(base.image_processor, indent=2))
    (folder / "processor_config.json").write_text(json.dumps(base.processor, indent=2))
    (folder / "chat_template.jinja").write_text(chat_template(base))
