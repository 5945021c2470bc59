"""What the tasks of this folder have in common: their data, what is said of a question, what an answer is worth."""

import hashlib
import json
import os

from linvt_hf.evaluation.layouts import BENCHMARKS, own_cache, read_records
from linvt_hf.evaluation.parsing import LETTERS, choice_in, contains, exact_match, number_in, token_f1


def __getattr__(name: str) -> dict:
    """`msvd_qa` and the like: lmms-eval's dataset_kwargs, once the benchmark's records are written in its cache."""
    if name not in BENCHMARKS:
        raise AttributeError(f"There is no {name} here.")
    lines = "".join(json.dumps(record) + "\n" for record in read_records(name))
    file = own_cache() / "records" / f"{name}-{hashlib.sha256(lines.encode()).hexdigest()[:16]}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(lines, encoding="utf-8")
        unfinished.replace(file)  # several processes may come here at once
    return {"data_files": {"test": str(file)}}


def video(doc: dict) -> list[str]:
    return [doc["video"]]


def question(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """With lettered options, if it has any, between the task's `pre_prompt` and `post_prompt`."""
    around = lmms_eval_specific_kwargs or {}
    options = [f"{letter}. {option}" for letter, option in zip(LETTERS, _lettered(doc), strict=False)]
    text = "\n".join([doc["question"], *options])
    return f"{around.get('pre_prompt', '')}{text}{around.get('post_prompt', '')}"


def _lettered(doc: dict) -> list[str]:
    """The options of a multiple-choice question; those of `shapes` are not shown, and its answer is in words."""
    return doc["options"] if isinstance(doc["answer"], int) else []


def target(doc: dict) -> str:
    return LETTERS[doc["answer"]] if isinstance(doc["answer"], int) else doc["answer"]


def choice(doc: dict, results: list[str]) -> dict:
    chosen = choice_in(results[0], doc["options"])
    return {"accuracy": float(chosen == doc["answer"]), "parsed": None if chosen is None else LETTERS[chosen]}


def open_ended(doc: dict, results: list[str]) -> dict:
    """Three measures that need no judge: the answer itself, an answer that holds it, and shared words."""
    said, right = results[0], doc["answer"]
    return {
        "exact_match": float(exact_match(said, right)),
        "contains": float(contains(said, right)),
        "token_f1": token_f1(said, right),
        "parsed": said,
        "question": doc["question"],  # for a judge, without what was said around it
    }


def count(doc: dict, results: list[str]) -> dict:
    """
    TGIF-QA's: squared error of the answer, brought to 1..10, from the right one, which is 1 where nothing happens; of
    an answer that names no number the worst there could be.
    """
    right, said = max(int(doc["answer"]), 1), number_in(results[0])
    off = max(right - 1, 10 - right) if said is None else min(max(said, 1), 10) - right
    return {"mse": float(off**2), "accuracy": float(off == 0), "parsed": said}
