"""Benchmarks as their makers publish them, to questions of one form; and what lmms-eval's tasks make of these."""

import json
import os
from pathlib import Path

import pytest

from linvt_hf.evaluation.layouts import BENCHMARKS, SHAPES_SCENES, read_records
from linvt_hf.evaluation.tasks import task_functions


def write(folder, files, videos=()):
    """JSON for what is no text; videos by name, each in its folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode())
    for video in videos:
        path = folder / video
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


MSVD = [{"id": 7, "video_id": 3, "question": "who walks?", "answer": "man"}]
ZERO_SHOT_Q = [
    {"video_name": "abc_1_2", "question_id": "v_abc_1_2_0", "question": "who?"},
    {"video_name": "def", "question_id": "v_def_0", "question": "what?"},
]
# In another order: they belong together by their ids.
ZERO_SHOT_A = [
    {"answer": "a dog", "type": 3, "question_id": "v_def_0"},
    {"answer": "man", "type": 5, "question_id": "v_abc_1_2_0"},
]


@pytest.mark.parametrize(
    ("files", "video"),
    [
        ({"test_qa.json": MSVD}, "video/vid3.avi"),
        ({"test_qa.json": MSVD}, "YouTubeClips/vid3.mp4"),
        ({"test_qa.json": MSVD, "youtube_mapping.txt": "xyz_1_2 vid3\nother vid4\n"}, "YouTubeClips/xyz_1_2.avi"),
    ],
)
def test_msvd_qa(tmp_path, files, video):
    (record,) = read_records("msvd_qa", write(tmp_path, files, [video]))
    assert record == {
        "question_id": "7",
        "video": str(tmp_path / video),
        "question": "who walks?",
        "answer": "man",
        "options": [],
        "kind": "",
    }


def test_msrvtt_qa(tmp_path):
    rows = [{"id": 1, "video_id": 9, "category_id": 2, "question": "who?", "answer": "man"}]
    (record,) = read_records("msrvtt_qa", write(tmp_path, {"test_qa.json": rows}, ["video/video9.mp4"]))
    assert record["video"] == str(tmp_path / "video/video9.mp4")


@pytest.mark.parametrize("name", ["msvd_qa", "msrvtt_qa", "activitynet_qa"])
def test_questions_and_answers_apart(tmp_path, name):
    write(tmp_path, {"test_q.json": ZERO_SHOT_Q, "test_a.json": ZERO_SHOT_A}, ["videos/all/abc_1_2.avi", "v_def.mkv"])
    first, second = read_records(name, tmp_path)
    assert (first["answer"], first["kind"], first["video"]) == ("man", "5", str(tmp_path / "videos/all/abc_1_2.avi"))
    assert (second["answer"], second["video"]) == ("a dog", str(tmp_path / "v_def.mkv"))
    write(tmp_path, {"test_a.json": ZERO_SHOT_A[:1]})
    with pytest.raises(ValueError, match="asks v_abc_1_2_0, to which test_a.json has no answer"):
        read_records(name, tmp_path)


TGIF = {
    "Test_frameqa_question.csv": "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\tdescription\r\n"
    'tumblr_a\twhat is "it"?\tred\t2\tFRAMEQA1\t5\ta red "thing"\r\n',
    "Test_action_question.csv": "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey\r\n"
    "tumblr_b\tWhat does it do 3 times?\tjump\trun\tsit\tnod\twave\t4\tACTION1\t6\r\n",
    "Test_transition_question.csv": "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey\r\n"
    "tumblr_b\tWhat before it sits?\tjump\trun\tsit\tnod\twave\t0\tTRANS1\t6\r\n",
    "Test_count_question.csv": "gif_name\tquestion\tanswer\tvid_id\tkey\r\n"
    "tumblr_b\tHow many times does it jump?\t0\tCOUNT1\t6\r\n",
}


def test_tgif_qa(tmp_path):
    write(tmp_path, TGIF, ["gifs/tumblr_a.gif", "gifs/tumblr_b.gif", "mp4/tumblr_b.mp4"])
    (frame,) = read_records("tgif_qa_frame", tmp_path)
    assert (frame["question"], frame["answer"], frame["kind"]) == ('what is "it"?', "red", "colour")
    assert frame["video"] == str(tmp_path / "gifs/tumblr_a.gif")
    (action,) = read_records("tgif_qa_action", tmp_path)
    assert (action["options"], action["answer"]) == (["jump", "run", "sit", "nod", "wave"], 4)
    assert action["video"] == str(tmp_path / "mp4/tumblr_b.mp4")  # of both that are there
    (transition,) = read_records("tgif_qa_transition", tmp_path)
    assert transition["answer"] == 0
    (count,) = read_records("tgif_qa_count", tmp_path)
    assert count["answer"] == "0"


def test_videovista(tmp_path):
    row = {
        "question_id": 12,
        "video_name": "Sports.10.3.mp4",
        "Question": "What?",
        "Answer_Choices": ["a ball", "a bat"],
        "Answer": 1,
        "Type": "Action Count",
        "time": 90,
        "category": "Sports",
    }
    rows = [row, {**row, "Type": "Relation Reasoning-Image"}]
    write(tmp_path, {"VideoVista.json": rows}, ["merged/Sports/10/Sports.10.3.mp4"])
    (record,) = read_records("videovista", tmp_path)
    assert (record["options"], record["answer"], record["kind"]) == (["a ball", "a bat"], 1, "Action Count")
    assert record["video"] == str(tmp_path / "merged/Sports/10/Sports.10.3.mp4")


def test_shapes_are_made_where_they_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES_SCENES, "video", 3)
    records = read_records("linvt_shapes", tmp_path)
    assert len({record["video"] for record in records}) == 3 and all(os.path.exists(r["video"]) for r in records)
    assert all(record["answer"] in record["options"] for record in records)
    before = os.stat(records[0]["video"]).st_mtime_ns
    assert read_records("linvt_shapes", tmp_path) == records and os.stat(records[0]["video"]).st_mtime_ns == before


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if "shapes" not in name])
def test_no_data(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"There is no .* in .*{tmp_path.name}.*; put the benchmark's files"):
        read_records(name, tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no"):
        read_records(name, tmp_path / "nowhere")


def test_files_of_another_form(tmp_path):
    write(tmp_path, {"test_qa.json": [{"id": 1}]})
    with pytest.raises(ValueError, match="The files of msvd_qa in .* are not as published: KeyError"):
        read_records("msvd_qa", tmp_path)
    write(tmp_path, {"test_qa.json": "{"})
    with pytest.raises(ValueError, match="are not as published"):
        read_records("msvd_qa", tmp_path)


def test_a_video_that_is_not_there_is_asked_about_all_the_same(tmp_path):
    """Its answer is missing then, with the reason; the question still counts."""
    (record,) = read_records("msvd_qa", write(tmp_path, {"test_qa.json": MSVD}))
    assert record["video"] == str(tmp_path / "vid3.mp4")


def test_what_tasks_ask_and_how_they_count(tmp_path, monkeypatch):
    monkeypatch.setenv("LINVT_DATA", str(tmp_path))
    write(tmp_path / "tgif_qa", TGIF, ["gifs/tumblr_b.gif"])
    file = task_functions.__getattr__("tgif_qa_action")["data_files"]["test"]
    doc = json.loads(Path(file).read_text(encoding="utf-8"))
    assert task_functions.__getattr__("tgif_qa_action")["data_files"]["test"] == file
    text = task_functions.question(doc, {"pre_prompt": "", "post_prompt": "\nThe letter only."})
    assert text == "What does it do 3 times?\nA. jump\nB. run\nC. sit\nD. nod\nE. wave\nThe letter only."
    assert task_functions.target(doc) == "E" and task_functions.video(doc) == [doc["video"]]
    assert task_functions.choice(doc, ["(E)"]) == {"accuracy": 1.0, "parsed": "E"}
    assert task_functions.choice(doc, ["it nods"]) == {"accuracy": 0.0, "parsed": None}
    with pytest.raises(AttributeError, match="There is no nosuch"):
        task_functions.__getattr__("nosuch")

    said = {"answer": "dog", "question": "Who?"}
    assert task_functions.open_ended(said, ["A dog."])["exact_match"] == 1.0
    assert task_functions.open_ended(said, ["It is a dog."]) == {
        "exact_match": 0.0,
        "contains": 1.0,
        "token_f1": 0.5,
        "parsed": "It is a dog.",
        "question": "Who?",
    }


@pytest.mark.parametrize(
    ("said", "right", "mse"), [("3", "5", 4), ("none", "0", 0), ("20", "9", 1), ("many", "2", 64), ("many", "9", 64)]
)
def test_counts_are_off_by_a_square(said, right, mse):
    counted = task_functions.count({"answer": right}, [said])
    assert counted["mse"] == mse and counted["accuracy"] == (mse == 0)
