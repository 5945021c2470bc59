"""`linvt batch`: every row once, whatever happens, in one process or by Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from video_files import moving_square, write_video

from linvt_hf.asking.batch import BatchSettings, Progress, run_batch
from linvt_hf.cli import main

MODEL = Path(__file__).parent.parent / "examples/linvt-shapes"
QUESTIONS = ("What shape flashes up?", "How many shapes are there?")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Nine, of which the fourth is broken."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(9):
        write_video(folder / f"{number}.mp4", moving_square(6 + number, height=64, width=64, seed=number))
    (folder / "3.mp4").write_bytes(b"no video")
    return folder


def settings(videos, **kwargs):
    return BatchSettings(
        str(MODEL), str(videos), **{"questions": QUESTIONS, "num_frames": 4, "max_new_tokens": 4, "chunk": 2, **kwargs}
    )


def rows(output: Path, kind: str) -> list[dict]:
    return [row for file in sorted((output / kind).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def done(videos, tmp_path_factory):
    output = tmp_path_factory.mktemp("done")
    progress = run_batch(settings(videos), output, batch_size=3)
    return output, progress


def test_every_question_has_its_answer_or_the_reason(done):
    output, progress = done
    answers, failed = rows(output, "answers"), rows(output, "failed")
    assert progress == Progress(answered=16, failed=2, chunks=5, of=5)
    assert [(row["video"], row["question"]) for row in answers] == [
        (f"{number}.mp4", question) for number in range(9) if number != 3 for question in QUESTIONS
    ]
    assert {row["id"] for row in answers if row["row"] == 2} == {"2.mp4"}
    assert all(row["answer"] and len(row["frame_times"]) == 4 for row in answers)
    assert [(row["row"], row["question"]) for row in failed] == [(3, question) for question in QUESTIONS]
    assert all("3.mp4" in row["error"] for row in failed)


def test_a_killed_job_goes_on_without_repeating_or_losing_a_row(done, videos, tmp_path):
    asked = ["batch", str(MODEL), str(videos), "--questions", *QUESTIONS, "--num-frames", "4", "--chunk", "1"]
    asked += ["--max-new-tokens", "4", "--output", str(tmp_path), "--batch-size", "1"]
    process = subprocess.Popen([sys.executable, "-m", "linvt_hf.cli", *asked], stderr=subprocess.DEVNULL)
    answers = tmp_path / "answers"
    for _ in range(600):  # until there are some, and not all
        if len(list(answers.glob("*.parquet"))) >= 2 or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {file.name: file.stat().st_mtime_ns for file in answers.glob("*.parquet")}
    assert 2 <= len(there) < 9
    (answers / "000008.part").write_bytes(b"half a fi")  # killed while it wrote
    assert main(asked) == 0
    assert {name: (answers / name).stat().st_mtime_ns for name in there} == there
    for kind in ("answers", "failed"):
        assert rows(tmp_path, kind) == rows(done[0], kind)
    assert main(asked) == 0  # nothing is left to do


def test_by_ray_the_same(done, videos, tmp_path, capfd):
    asked = ["batch", str(MODEL), str(videos), "--questions", *QUESTIONS, "--num-frames", "4", "--chunk", "2"]
    asked += ["--max-new-tokens", "4", "--output", str(tmp_path), "--batch-size", "3", "--workers", "2"]
    done_here = subprocess.run(
        [sys.executable, "-m", "linvt_hf.cli", *asked], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done_here.returncode == 0, done_here.stderr
    assert "16 answers, 2 questions without one" in done_here.stdout
    for kind in ("answers", "failed"):
        assert rows(tmp_path, kind) == rows(done[0], kind)


def test_what_is_left_of_a_damaged_file(tmp_path):
    file = write_video(tmp_path / "cut.mp4", moving_square(24), gop=6, faststart=True)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
    assert run_batch(settings(tmp_path), tmp_path / "raise").failed == 2
    assert run_batch(settings(tmp_path, on_error="keep"), tmp_path / "keep").answered == 2


def test_what_is_no_question_fails_alone(videos, tmp_path):
    lines = tmp_path / "rows.jsonl"
    questions = [QUESTIONS[0], 5, None, QUESTIONS[1]]
    lines.write_text("\n".join(json.dumps({"video": str(videos / "0.mp4"), "question": q}) for q in questions))
    assert run_batch(settings(lines, questions=()), tmp_path / "out") == Progress(2, 2, 2, 2)
    failed = rows(tmp_path / "out", "failed")
    assert [(row["row"], row["question"]) for row in failed] == [(1, "5"), (2, None)]
    assert "got int 5" in failed[0]["error"] and "got NoneType None" in failed[1]["error"]


def test_rows_of_files(videos, tmp_path, done):
    """With ids and questions of their own; paths are from the file's folder on."""
    table = [
        {"id": "a", "video": f"{videos.name}/0.mp4", "question": QUESTIONS[0], "more": 1},
        {"id": "b", "video": str(videos / "1.mp4"), "question": QUESTIONS[1], "more": 2},
    ]
    lines, parquet = videos.parent / "rows.jsonl", videos.parent / "rows.parquet"
    lines.write_text("\n\n".join(json.dumps(row) for row in table))
    pq.write_table(pa.Table.from_pylist(table), parquet)
    expected = {(row["video"], row["question"]): row["answer"] for row in rows(done[0], "answers")}
    for source in (lines, parquet):
        output = tmp_path / source.suffix
        run_batch(settings(source, questions=()), output)
        first, second = rows(output, "answers")
        assert (first["id"], first["video"], second["id"]) == ("a", f"{videos.name}/0.mp4", "b")
        assert first["answer"] == expected["0.mp4", QUESTIONS[0]]
        assert second["answer"] == expected["1.mp4", QUESTIONS[1]]


def test_options(videos, tmp_path):
    run_batch(settings(videos, choices=("circle", "star"), questions=QUESTIONS[:1]), tmp_path)
    for row in rows(tmp_path, "answers"):
        likeliest = max(range(2), key=row["log_likelihoods"].__getitem__)
        assert row["answer"] == ("circle", "star")[likeliest]


def test_what_failed_is_asked_again(videos, tmp_path, capsys):
    late = tmp_path / "late"
    late.mkdir()
    asked = ["batch", str(MODEL), str(late), "--questions", *QUESTIONS, "--num-frames", "4", "--max-new-tokens", "4"]
    asked += ["--output", str(tmp_path / "out")]
    (late / "0.mp4").write_bytes(b"still on its way")
    assert main(asked) == 2
    assert "None of 2 questions has an answer" in capsys.readouterr().err
    (late / "0.mp4").write_bytes((videos / "0.mp4").read_bytes())
    assert main(asked) == 2
    assert main([*asked, "--retry"]) == 0
    assert len(rows(tmp_path / "out", "answers")) == 2 and not rows(tmp_path / "out", "failed")
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.parquet")}
    assert main([*asked, "--retry"]) == 0
    assert {file: file.stat().st_mtime_ns for file in written} == written


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "Who?"}', "Row 0 of .* has no video"),
        ('{"video": 3}', "Row 0 of .* has no video"),
        ('{"video": "a.mp4"}', "Row 0 of .* has no question, and none were given for all"),
        ("[1]", "Line 1 of .* is no JSON object"),
        ("{", "Line 1 of .* is no JSON object"),
        ("", "holds no videos"),
    ],
)
def test_one_sentence_about_rows(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        run_batch(settings(file, questions=()), tmp_path / "out")


def test_one_sentence(videos, tmp_path, done):
    with pytest.raises(FileNotFoundError, match="There is no .*nowhere"):
        run_batch(settings(tmp_path / "nowhere"), tmp_path / "out")
    (tmp_path / "rows.csv").write_text("video")
    with pytest.raises(ValueError, match="is no .parquet, no .jsonl and no folder of videos"):
        run_batch(settings(tmp_path / "rows.csv"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"results of other settings \(num_frames was 4 and is 5\)"):
        run_batch(settings(videos, num_frames=5), done[0])


def test_too_many_workers(videos, tmp_path):
    with pytest.raises(ValueError, match="500 workers need as many CPUs, and Ray has"):
        run_batch(settings(videos), tmp_path, workers=500)
