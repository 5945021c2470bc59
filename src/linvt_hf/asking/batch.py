"""
`linvt batch`: the same questions of very many videos, into Parquet, on one machine or many.

Rows are taken some at a time, in chunks, and a chunk's answers are one file that is there whole or not at all: a job
that was killed goes on with the chunks that are not there, so every row comes once. One process answers chunk after
chunk; several are actors of Ray Data, each with a device, and give the same files.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from .answers import answer_all
from .loading import load_pipeline
from .settings_file import keep_settings

VIDEO_SUFFIXES = {".mp4", ".avi", ".webm", ".mkv", ".mov", ".gif", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
CHUNK = 256  # rows of the input; ours
_ASKED = {"row": pa.int64(), "id": pa.string(), "video": pa.string(), "question": pa.string()}
ANSWERS = pa.schema(
    {
        **_ASKED,
        "answer": pa.string(),
        "frame_times": pa.list_(pa.float32()),
        "log_likelihoods": pa.list_(pa.float32()),
    }
)
FAILED = pa.schema({**_ASKED, "error": pa.string()})


@dataclass(frozen=True)
class BatchSettings:
    """
    What the answers of a job depend on; see `linvt batch --help`.

    questions: asked of every video; none if each row has its own. choices: options of every question.
    """

    model: str
    input: str
    questions: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    base: str | None = None
    dtype: str = "auto"
    quantize: str | None = None
    num_frames: int | None = None
    fps: float | None = None
    on_error: str = "raise"
    max_new_tokens: int = 256
    chunk: int = CHUNK


@dataclass(frozen=True)
class Progress:
    """Questions with and without an answer, those of earlier runs too; and chunks that are done, of how many."""

    answered: int
    failed: int
    chunks: int
    of: int


def run_batch(
    settings: BatchSettings,
    output: Path,
    *,
    workers: int = 1,
    device: str | None = None,
    batch_size: int = 8,
    retry: bool = False,
    say: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """
    Answers all questions into `output/answers/*.parquet`, and those that have no answer, with the reason, into
    `output/failed/*.parquet`; columns are those of `ANSWERS` and `FAILED`, `row` is the input's.

    Args:
        workers: more than one are actors of Ray Data, on the machines that Ray knows of, each with a GPU of its own
            where there are any.
        device: of the one worker; batch_size: questions at a time, fewer where memory is short.
        retry: whether chunks with a question that got no answer are done again.
        say: is told how it goes.

    Raises `ValueError` for an input without videos, or a folder that holds another job.
    """
    total = count_rows(Path(settings.input))
    keep_settings(output / "job.json", {**asdict(settings), "rows": total})
    chunks = -(-total // settings.chunk)
    done = [number for number in range(chunks) if _file(output, "answers", number).exists()]
    if retry:
        done = [number for number in done if not _rows(output, "failed", number)]
    answered, failed = (sum(_rows(output, kind, number) for number in done) for kind in ("answers", "failed"))
    progress = Progress(answered, failed, len(done), chunks)
    say(progress)
    missing = sorted(set(range(chunks)) - set(done))
    if not missing:
        return progress
    answers = _by_ray if workers > 1 else _here
    for number, tables in answers(settings, missing, workers, device, batch_size):
        # The answers last: they say that a chunk is done. So those of another try go first.
        _file(output, "answers", number).unlink(missing_ok=True)
        for kind in ("failed", "answers"):
            file = _file(output, kind, number)
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".part")
            pq.write_table(tables[kind], unfinished)
            unfinished.replace(file)
        progress = replace(
            progress,
            answered=progress.answered + len(tables["answers"]),
            failed=progress.failed + len(tables["failed"]),
            chunks=progress.chunks + 1,
        )
        say(progress)
    return progress


def _file(output: Path, kind: str, chunk: int) -> Path:
    return output / kind / f"{chunk:06d}.parquet"


def _rows(output: Path, kind: str, chunk: int) -> int:
    return pq.read_metadata(_file(output, kind, chunk)).num_rows


# ---- rows ----


def count_rows(source: Path) -> int:
    """Of a Parquet or JSONL file, or a folder of videos. Raises `ValueError` for anything else, and for none."""
    if source.is_dir():
        total = len(_videos_in(source))
    elif not source.exists():
        raise FileNotFoundError(f"There is no {source}.")
    elif source.suffix == ".parquet":
        total = pq.read_metadata(source).num_rows
    elif source.suffix == ".jsonl":
        with source.open("rb") as lines:
            total = sum(1 for line in lines if line.strip())
    else:
        raise ValueError(f"{source} is no .parquet, no .jsonl and no folder of videos.")
    if total == 0:
        raise ValueError(f"{source} holds no videos.")
    return total


def _videos_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)


def read_rows(source: Path) -> Iterator[dict]:
    """Dicts with `video`, as it stands there, `path`, where it is, and perhaps `id` and `question`."""
    if source.is_dir():
        for path in _videos_in(source):
            name = str(path.relative_to(source))
            yield {"id": name, "video": name, "path": str(path.absolute())}
        return
    if source.suffix == ".parquet":
        file = pq.ParquetFile(source)
        columns = [name for name in ("id", "video", "question") if name in file.schema_arrow.names]
        rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
    else:
        rows = _json_rows(source)
    for number, row in enumerate(rows):
        video = row.get("video")
        if not isinstance(video, str) or not video:
            raise ValueError(f"Row {number} of {source} has no video; each needs a path or URL in 'video'.")
        yield {**row, "path": video if "://" in video else str(source.parent.absolute() / video)}


def _json_rows(source: Path) -> Iterator[dict]:
    with source.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield dict(json.loads(line))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"Line {number} of {source} is no JSON object: {error}.") from error


def _chunks(settings: BatchSettings, wanted: Sequence[int]) -> Iterator[tuple[int, list[dict]]]:
    """The wanted chunks' questions, each with its row."""
    wanted, asked, chunk = set(wanted), [], 0
    source = Path(settings.input)
    for number, row in enumerate(read_rows(source)):
        if number == 0 and not settings.questions and "question" not in row:  # a later row's is its own mistake
            raise ValueError(f"Row {number} of {source} has no question, and none were given for all.")
        if number // settings.chunk != chunk:
            if chunk in wanted:
                yield chunk, asked
            asked, chunk = [], number // settings.chunk
        if chunk in wanted:
            questions = settings.questions or (row.get("question"),)
            about = {"row": number, "id": str(row.get("id", number)), "video": row["video"], "path": row["path"]}
            asked += [{**about, "question": question} for question in questions]
    if chunk in wanted:
        yield chunk, asked


# ---- answers ----


class Worker:
    """A loaded model, and how long it spent on what: `seconds` by kind of work."""

    def __init__(self, settings: BatchSettings, device: str | None, batch_size: int):
        self.settings, self.batch_size = settings, batch_size
        self.pipeline = load_pipeline(
            settings.model, device=device, dtype=settings.dtype, quantize=settings.quantize, base=settings.base
        )
        self.asking = {name: getattr(settings, name) for name in ("num_frames", "fps")}
        if settings.on_error != "raise":
            self.asking["videos_kwargs"] = {"on_error": settings.on_error}
        if not settings.choices:
            self.asking |= {"max_new_tokens": settings.max_new_tokens, "do_sample": False}

    def __call__(self, asked: list[dict]) -> dict[str, pa.Table]:
        choices = {"choices": list(self.settings.choices)} if self.settings.choices else {}
        inputs = [{"video": one["path"], "question": one["question"], **choices} for one in asked]
        answers, failed = [], []
        found = answer_all(self.pipeline, inputs, batch_size=self.batch_size, **self.asking)
        for one, answer in zip(asked, found, strict=True):
            if answer.error is not None:
                failed.append({**one, "question": _text(one["question"]), "error": answer.error})
                continue
            scores = answer.log_likelihoods
            answers.append(
                {
                    **one,
                    "answer": answer.text,
                    "frame_times": answer.frame_times[0],
                    "log_likelihoods": scores and [scores[choice] for choice in self.settings.choices],
                }
            )
        return {
            "answers": pa.Table.from_pylist(answers, ANSWERS),
            "failed": pa.Table.from_pylist(failed, FAILED),
        }


def _text(question: object) -> str | None:
    """What was given as a question, to be written down."""
    return None if question is None else str(question)


def _here(
    settings: BatchSettings, missing: Sequence[int], workers: int, device: str | None, batch_size: int
) -> Iterator[tuple[int, dict[str, pa.Table]]]:
    worker = Worker(settings, device, batch_size)
    for number, asked in _chunks(settings, missing):
        yield number, worker(asked)


def _by_ray(
    settings: BatchSettings, missing: Sequence[int], workers: int, device: str | None, batch_size: int
) -> Iterator[tuple[int, dict[str, pa.Table]]]:
    """As chunks are done, in any order. What goes to an actor and comes back is one row a chunk."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"Several workers need Ray ({error}): pip install 'linvt_hf[batch]'.") from error

    if started := not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
        if workers > (gpus or cpus):
            raise ValueError(
                f"{workers} workers need as many {'GPUs' if gpus else 'CPUs'}, and Ray has {gpus or cpus}."
            )
        logging.getLogger("ray.data").setLevel(logging.WARNING)  # its account of itself, between the bars
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        items = [{"chunk": number, "asked": json.dumps(asked)} for number, asked in _chunks(settings, missing)]
        threads = max(cpus // workers, 1)
        answered = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(settings, "cuda" if gpus else "cpu", batch_size, threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads,
            num_gpus=1 if gpus else 0,
        )
        for row in answered.iter_rows():
            yield row["chunk"], {kind: pa.ipc.open_stream(row[kind]).read_all() for kind in ("answers", "failed")}
    finally:
        if started:
            ray.shutdown()


class _Actor:
    def __init__(self, settings: BatchSettings, device: str, batch_size: int, threads: int):
        torch.set_num_threads(threads)  # its share of the machine: for decoding, and on a CPU for the model
        self.worker = Worker(settings, device, batch_size)

    def __call__(self, batch: dict) -> dict:
        tables = self.worker(json.loads(batch["asked"][0]))
        return {"chunk": batch["chunk"], **{kind: [_bytes(table)] for kind, table in tables.items()}}


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
