"""
Benchmarks that lmms-eval lacks, from the files their makers publish: questions as records of one form.

A record is a dict with `question_id`, `video` (a path), `question`, `answer` (of a multiple-choice question the number
of the right option), `options` (texts without letters; none for open questions) and `kind`. Videos may lie anywhere
under a benchmark's folder: they are found by their names.
"""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

_SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".gif")  # where a video is there in several, the first
SHAPES_SCENES = {"video": 500, "long": 100}  # of the test split, as `python -m linvt_hf.shapes data` writes it


def own_cache() -> Path:
    """For what is made of benchmarks: in Hugging Face's home."""
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "linvt"


def data_folder() -> Path:
    """Where benchmarks lie, a folder each: $LINVT_DATA, or our cache."""
    return Path(os.environ.get("LINVT_DATA") or own_cache())


def read_records(benchmark: str, folder: Path | None = None) -> list[dict]:
    """
    A benchmark's test questions, in the order of its file.

    Args:
        benchmark: one of `BENCHMARKS`.
        folder: by default the one of its name in `data_folder()`.

    Raises `FileNotFoundError` saying which files are expected where, `ValueError` for a file of another form.
    """
    home, read = BENCHMARKS[benchmark]
    if folder is None:  # what can be made anew needs no place among data
        folder = (own_cache() if home == "shapes" else data_folder()) / home
    try:
        return read(Path(folder))
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"The files of {benchmark} in {folder} are not as published: {error!r}.") from error


class _Videos:
    """Video files under a folder, by name."""

    def __init__(self, folder: Path):
        self.folder, self.paths = folder, {}
        found = [path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES]
        for path in sorted(found, key=lambda path: _SUFFIXES.index(path.suffix.lower()), reverse=True):
            self.paths[path.stem] = str(path)

    def __getitem__(self, name: str) -> str:
        """One that is not there is an error when it is read, and says then where it was expected."""
        return self.paths.get(name, str(self.folder / f"{name}.mp4"))


def _need(folder: Path, *names: str) -> Path:
    """The first of these files that is there."""
    for name in names:
        if found := sorted(folder.rglob(name)):
            return found[0]
    raise FileNotFoundError(f"There is no {' or '.join(names)} in {folder}; put the benchmark's files there.")


def _json(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def _open_questions(folder: Path, video_name: Callable[[dict], str]) -> list[dict]:
    """
    Of the authors' `test_qa.json`, or of `test_q.json` and `test_a.json`, in which Video-ChatGPT's protocol has them
    apart, with names of videos.
    """
    videos = _Videos(folder)
    file = _need(folder, "test_qa.json", "test_q.json")
    records = []
    if file.name == "test_qa.json":
        for row in _json(file):
            records.append(_open(row["id"], videos[video_name(row)], row["question"], row["answer"]))
        return records
    answers = {row["question_id"]: row for row in _json(_need(folder, "test_a.json"))}
    for row in _json(file):
        if (right := answers.get(row["question_id"])) is None:
            raise ValueError(f"{file} asks {row['question_id']}, to which test_a.json has no answer.")
        name = str(row["video_name"])
        known = f"v_{name}" if f"v_{name}" in videos.paths else name  # ActivityNet's files
        kind = str(right.get("type", ""))
        records.append(_open(row["question_id"], videos[known], row["question"], right["answer"], kind))
    return records


def _open(number, video: str, question: str, answer, kind: str = "") -> dict:
    about = {"question_id": str(number), "video": video, "question": question, "answer": str(answer)}
    return {**about, "options": [], "kind": kind}


def _msvd_qa(folder: Path) -> list[dict]:
    # Its videos have numbers; as YouTube's clips they come with a list of which is which.
    names = {}
    if folder.is_dir() and (mapping := sorted(folder.rglob("youtube_mapping.txt"))):
        pairs = (line.split() for line in mapping[0].read_text(encoding="utf-8").splitlines() if line.strip())
        names = {number: name for name, number in pairs}
    videos = _Videos(folder).paths

    def video_name(row: dict) -> str:
        number = f"vid{row['video_id']}"
        return number if number in videos else names.get(number, number)

    return _open_questions(folder, video_name)


def _msrvtt_qa(folder: Path) -> list[dict]:
    return _open_questions(folder, lambda row: f"video{row['video_id']}")


def _activitynet_qa(folder: Path) -> list[dict]:
    return _open_questions(folder, lambda row: str(row["video_id"]))


def _tgif_rows(folder: Path, task: str) -> list[dict]:
    """Of a file that is named .csv, and holds tabs and no quotation."""
    file = _need(folder, f"Test_{task}_question.csv")
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def _tgif_qa_frame(folder: Path) -> list[dict]:
    videos, kinds = _Videos(folder), ("object", "number", "colour", "location")
    return [
        _open(row["vid_id"], videos[row["gif_name"]], row["question"], row["answer"], kinds[int(row["type"])])
        for row in _tgif_rows(folder, "frameqa")
    ]


def _tgif_qa_count(folder: Path) -> list[dict]:
    videos = _Videos(folder)
    return [
        _open(row["vid_id"], videos[row["gif_name"]], row["question"], int(row["answer"]))
        for row in _tgif_rows(folder, "count")
    ]


def _tgif_choices(task: str) -> Callable[[Path], list[dict]]:
    def read(folder: Path) -> list[dict]:
        videos = _Videos(folder)
        return [
            {
                "question_id": row["vid_id"],
                "video": videos[row["gif_name"]],
                "question": row["question"],
                "answer": int(row["answer"]),
                "options": [row[f"a{number}"] for number in range(1, 6)],
                "kind": "",
            }
            for row in _tgif_rows(folder, task)
        ]

    return read


def _videovista(folder: Path) -> list[dict]:
    """All but questions on a video and an image, or on two videos, which most models are not asked."""
    videos = _Videos(folder)
    return [
        {
            "question_id": str(row["question_id"]),
            "video": videos[Path(row["video_name"]).stem],
            "question": row["Question"],
            "answer": int(row["Answer"]),
            "options": list(row["Answer_Choices"]),
            "kind": row["Type"],
        }
        for row in _json(_need(folder, "VideoVista.json"))
        if not row["Type"].startswith("Relation Reasoning")
    ]


def _shapes(kind: str) -> Callable[[Path], list[dict]]:
    """Of this project's own world; generated where they are not there, in a minute."""

    def read(folder: Path) -> list[dict]:
        from ..shapes.videos import write_split

        file = folder / f"{kind}-test.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # other processes wait; this file is written last, when all videos are there
            if not file.exists():
                write_split(folder, kind, "test", SHAPES_SCENES[kind])
        records = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            (video, question), (answer,) = (message["content"] for message in row["messages"])
            path = str(folder / video["video"])
            about = {"options": row["options"], "kind": row["kind"]}
            records.append({**_open(number, path, question["text"], answer["text"]), **about})
        return records

    return read


# By name: the folder it is expected in, and how it is read.
BENCHMARKS: dict[str, tuple[str, Callable[[Path], list[dict]]]] = {
    "msvd_qa": ("msvd_qa", _msvd_qa),
    "msrvtt_qa": ("msrvtt_qa", _msrvtt_qa),
    "activitynet_qa": ("activitynet_qa", _activitynet_qa),
    "tgif_qa_frame": ("tgif_qa", _tgif_qa_frame),
    "tgif_qa_action": ("tgif_qa", _tgif_choices("action")),
    "tgif_qa_transition": ("tgif_qa", _tgif_choices("transition")),
    "tgif_qa_count": ("tgif_qa", _tgif_qa_count),
    "videovista": ("videovista", _videovista),
    "linvt_shapes": ("shapes", _shapes("video")),
    "linvt_shapes_long": ("shapes", _shapes("long")),
}
