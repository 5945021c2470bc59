"""LinVT in lmms-eval's own command, on benchmarks that the tests write as their makers publish them."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from video_files import moving_square, write_video

from linvt_hf.cli import main
from linvt_hf.evaluation.lmms_plugin import manifest
from linvt_hf.evaluation.report import compare_runs
from linvt_hf.evaluation.run import TASKS
from linvt_hf.evaluation.scores import read_answers, read_run, score_tasks

MODEL = Path(__file__).parent.parent / "examples/linvt-shapes"
LETTER = "\nAnswer with the option's letter from the given choices directly."
WORD = "\nAnswer the question using a single word or phrase."


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working directory with what would be datasets of the Hub, and a Hugging Face home with their videos."""
    folder = tmp_path_factory.mktemp("benchmarks")
    videos = {n: folder / "home" / "mvbench_video" / "ssv2_video_mp4" / f"{n}.mp4" for n in range(4)}
    videos |= {n: folder / "home" / "egoschema" / "videos" / f"ego{n}.mp4" for n in range(4, 7)}
    videos |= {n: folder / "data" / "msvd_qa" / "YouTubeClips" / f"clip_{n}.avi" for n in range(7, 9)}
    for number, path in videos.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, moving_square(6 + number, seed=number))
    videos[3].write_bytes(b"no video")
    videos[6].unlink()

    mvbench = [
        {"video": f"{n}.mp4", "question": f"What is {n}?", "candidates": ["up", "down"], "answer": answer}
        for n, answer in enumerate(["down", "up", "up", "up"])
    ]
    write_json(folder / "OpenGVLab/MVBench/json/action_antonym.json", mvbench)
    write_json(folder / "OpenGVLab/MVBench/README.md", _configs(action_antonym="json/action_antonym.json"))
    egoschema = [
        {
            "video_idx": f"ego{n}",
            "question": f"Why {n}?",
            "option": [f"{letter}. reason {number}" for number, letter in enumerate("ABCDE")],
            "answer": answer,
        }
        for n, answer in zip(range(4, 7), "013", strict=True)
    ]
    write_json(folder / "lmms-eval/egoschema/subset.jsonl", "".join(json.dumps(row) + "\n" for row in egoschema))
    write_json(folder / "lmms-eval/egoschema/README.md", _configs(Subset={"test": "subset.jsonl"}))
    msvd = [
        {"id": n, "video_id": video, "question": question, "answer": answer}
        for n, (video, question, answer) in enumerate(
            [
                (7, "who walks?", "man"),
                (8, "what runs?", "dog"),
                (7, "what is red?", "ball"),
                (9, "who is not there?", "cat"),
            ]
        )
    ]
    write_json(folder / "data/msvd_qa/test_qa.json", msvd)
    write_json(folder / "data/msvd_qa/youtube_mapping.txt", "clip_7 vid7\nclip_8 vid8\nclip_9 vid9\n")
    return folder


def _configs(**files) -> str:
    def data(what):
        return what if isinstance(what, str) else [{"split": split, "path": path} for split, path in what.items()]

    configs = [{"config_name": name, "data_files": data(what)} for name, what in files.items()]
    return f"---\n{yaml.safe_dump({'configs': configs})}---\n"


def environment(home: Path) -> dict:
    return {**os.environ, "HF_HOME": str(home / "home"), "LINVT_DATA": str(home / "data")}


# Answers made by hand, by task and number of the question, which the model is then not asked for.
MVBENCH = {0: "(B) down", 1: "It is B."}
EGOSCHEMA = {0: "A"}
MSVD = {0: "a Man.", 1: "It is a dog"}


@pytest.fixture(scope="module")
def ran(home):
    """One run of the real command on three benchmarks and our own, of which some answers are there already."""
    output = home / "run"
    output.mkdir()
    prompts = {
        "mvbench_action_antonym": "Question:What is {}?\nOption:\n(A) up\n(B) down\nOnly give the best option.\n",
        "msvd_qa": "{}" + WORD,
    }
    lines = []

    def say(task, doc_id, question, answer, split="test"):
        line = {"task": task, "split": split, "doc_id": doc_id, "question": question, "videos": []}
        line |= {"frame_times": [], "answer": answer, "error": None, "log_likelihoods": None}
        made_with = {"pretrained": str(MODEL), "dtype": "auto", "num_frames": 16, "do_sample": False}
        ours = task == "msvd_qa"
        line["made_with"] = made_with | ({"max_new_tokens": 32} if ours else {"max_new_tokens": 16, "num_beams": 1})
        lines.append(json.dumps(line) + "\n")

    for doc, answer in MVBENCH.items():
        say("mvbench_action_antonym", doc, prompts["mvbench_action_antonym"].format(doc), answer, split="train")
    options = "".join(f"\n{letter}. reason {n}" for n, letter in enumerate("ABCDE"))
    for doc, answer in EGOSCHEMA.items():
        say("egoschema_subset", doc, f"Why {4 + doc}?{options}{LETTER}", answer)
    for doc, answer in MSVD.items():
        say("msvd_qa", doc, ["who walks?", "what runs?"][doc] + WORD, answer)
    (output / "record.jsonl").write_text("".join(lines) + '{"task": "msvd_qa", "sp')  # killed while it wrote
    tasks = "mvbench_action_antonym,egoschema_subset,msvd_qa,linvt_shapes"
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "linvt", "--tasks", tasks, "--batch_size", "8"),
        *("--model_args", f"pretrained={MODEL},record={output / 'record.jsonl'},num_frames=16"),
        *("--include_path", TASKS, "--output_path", output, "--log_samples", "--limit", "120"),
    ]
    done = subprocess.run(command, cwd=home, env=environment(home), capture_output=True, text=True, timeout=600)
    assert "linvt_shapes" in done.stdout, done.stdout + done.stderr
    return output, done


def test_the_entry_point_is_found():
    (found,) = [point for point in importlib.metadata.entry_points(group="lmms_eval.models") if point.name == "linvt"]
    assert found.load() is manifest and manifest().model_id == "linvt"


def test_scores_are_those_of_answers_made_by_hand(ran):
    output, _ = ran
    answers = {(answer.task, answer.doc_id): answer for answer in read_run(output)}
    mvbench = [answers["mvbench_action_antonym", n].scores["mvbench_accuracy"] for n in range(4)]
    assert mvbench[:2] == [1.0, 0.0]
    ego = [answers["egoschema_subset", n] for n in range(3)]
    assert ego[0].scores["score"] == 1.0 and ego[0].parsed == 0
    said = {n: answers["msvd_qa", n].scores for n in range(4)}
    assert said[0] == {"exact_match": 1.0, "contains": 1.0, "token_f1": 1.0}
    assert said[1] == {"exact_match": 0.0, "contains": 1.0, "token_f1": 0.5}
    results = json.loads(next(output.rglob("*_results.json")).read_text())["results"]
    # Of what the model itself was asked nothing is right: it knows neither letters nor these words.
    assert results["msvd_qa"]["exact_match,none"] == 0.25 and results["msvd_qa"]["contains,none"] == 0.5
    assert (
        results["mvbench_action_antonym"]["mvbench_accuracy,none"] == 100 * sum(mvbench) / 3
    )  # without the broken one


def test_every_answer_can_be_traced(ran):
    output, _ = ran
    answers = read_run(output)
    asked = {(answer.task, answer.doc_id): answer for answer in answers}
    one = asked["msvd_qa", 2]
    assert one.question == "what is red?" and one.answer == one.parsed
    assert Path(one.videos[0]).name == "clip_7.avi" and len(one.frame_times[0]) == 13  # all it has
    assert asked["mvbench_action_antonym", 2].question.startswith("Question:What is 2?\nOption:\n(A) up\n(B) down")
    # What could not be read, and what is not there, is counted and named.
    faults = {key: answer.error for key, answer in asked.items() if answer.error is not None}
    assert faults.keys() == {("mvbench_action_antonym", 3), ("egoschema_subset", 2), ("msvd_qa", 3)}
    assert "3.mp4" in faults["mvbench_action_antonym", 3] and "ego6" in faults["egoschema_subset", 2]
    assert "clip_9.mp4" in faults["msvd_qa", 3] or "vid9" in faults["msvd_qa", 3]
    for key in faults:  # lmms-eval's EgoSchema takes an option at random
        assert set(asked[key].scores.values()) == {0.0}
    scores = {(score.task, score.metric): score for score in score_tasks(answers)}
    assert scores["msvd_qa", "exact_match"].unanswered == 1 and scores["msvd_qa", "exact_match"].questions == 4
    assert scores["mvbench_action_antonym", "mvbench_accuracy"].interval.mean == pytest.approx(
        sum(asked["mvbench_action_antonym", n].scores["mvbench_accuracy"] for n in range(4)) / 4
    )


def test_the_shipped_model_is_as_good_as_its_card_says(ran):
    """93.6 % of all 2,454 questions; of the first 120, 114 were right when this was written, on one CPU."""
    output, _ = ran
    scores = {(score.task, score.metric): score for score in score_tasks(read_run(output))}
    shapes = scores["linvt_shapes", "exact_match"]
    assert shapes.questions == 120 and shapes.unanswered == 0
    assert 0.93 <= shapes.interval.mean <= 0.97


def test_two_processes_say_what_one_says_and_missing_data_ends_nothing(ran, home, monkeypatch, capsys):
    output, _ = ran
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HOME", str(home / "home"))
    command = ["eval", str(MODEL), "--tasks", "videovista,linvt_shapes", "--output", str(home / "two")]
    command += ["--processes", "2", "--batch-size", "8", "--limit", "41", "--data", str(home / "data"), "--compare"]
    assert main(command) == 2
    said = capsys.readouterr()
    assert (
        "There is no VideoVista.json in" in said.err and "No result for videovista; the others are above" in said.err
    )
    assert "| linvt_shapes | exact_match | 95.1 |" in said.out
    one = {a.doc_id: a for a in read_run(output) if a.task == "linvt_shapes" and a.doc_id < 41}
    two = read_answers(home / "two")
    assert [answer.doc_id for answer in two] == list(range(41))
    assert [answer.answer for answer in two] == [one[answer.doc_id].answer for answer in two]
    assert {compared.found.p_value for compared in compare_runs(list(one.values()), two)} == {1.0}
    assert {path.name for path in (home / "two/linvt_shapes").glob("record*")} == {"record.jsonl.0", "record.jsonl.1"}
    report = (home / "two/report.md").read_text()
    assert "| linvt_shapes | exact_match | 95.1 |" in report and "No result for videovista" in report
    # Again: what is done is not run again; and other settings are another run.
    before = (home / "two/linvt_shapes/log.txt").stat().st_mtime_ns
    command[3] = "linvt_shapes"
    assert main(command) == 0
    assert (home / "two/linvt_shapes/log.txt").stat().st_mtime_ns == before
    assert main([*command, "--num-frames", "8"]) == 2
    assert "holds results of other settings (num_frames was None and is 8)" in capsys.readouterr().err
    assert main(["compare", str(home / "two"), str(home / "two/linvt_shapes")]) == 0
    assert "| linvt_shapes | exact_match | 95.1 | 95.1 | 0.0 | 0.0 to 0.0 | 1.0000 | 41 |" in capsys.readouterr().out


# ---- the class, in this process ----


class Task:
    """As much of one of lmms-eval's as its models see."""

    def __init__(self, docs):
        self.docs = docs

    def requests(self, settings=None, name="t"):
        settings = {"max_new_tokens": 4, "temperature": 0, "until": ["\n\n"], **(settings or {})}
        return [
            instance("generate_until", ("context", self.messages, dict(settings), number, name, "test"), number, name)
            for number in range(len(self.docs))
        ]

    @staticmethod
    def messages(doc):
        if "fault" in doc:
            sys.exit(doc["fault"])
        content = [{"type": "video", "url": str(doc["video"])}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": content}]

    def options(self, name="t"):
        """Requests for likelihoods, one an option, as of a task with output_type multiple_choice."""
        return [
            instance(
                "loglikelihood",
                (doc["question"], f" {option}", lambda doc: [str(doc["video"])], number, name, "test"),
                number,
                name,
            )
            for number, doc in enumerate(self.docs)
            for option in doc["options"]
        ]


def instance(kind, arguments, number, name):
    from lmms_eval.api.instance import Instance

    return Instance(kind, arguments, 0, metadata={"task": name, "doc_id": number, "repeats": 1})


def loaded(task, simple=False, **kwargs):
    from linvt_hf.evaluation.lmms_model import LinVT, LinVTSimple

    model = (LinVTSimple if simple else LinVT)(str(MODEL), device="cpu", **kwargs)
    model.task_dict = {"t": {"test": task.docs}}
    return model


@pytest.fixture(scope="module")
def task():
    video = MODEL / "example.mp4"
    questions = {
        "What shape flashes up?": ["circle", "star", "cross"],
        "Which way does the yellow cross move?": ["up", "down"],
        "How many shapes are there?\nA. one\nB. two": ["A", "B"],
    }
    docs = [{"video": video, "question": question, "options": options} for question, options in questions.items()]
    return Task([*docs, {**docs[0], "fault": "video path: nowhere does not exist"}])


def test_videos_are_encoded_once_and_answers_come_in_order(task, monkeypatch, capsys):
    model, read = loaded(task, batch_size=2), []
    encode = model.pipeline.model.encode_videos
    monkeypatch.setattr(
        model.pipeline.model, "encode_videos", lambda videos, progress: read.append(len(videos)) or encode(videos)
    )
    answers = model.generate_until(task.requests())
    assert answers[:2] == ["circle", "down"] and answers[3] == ""
    assert sum(read) == 1
    assert "t 3 has no answer: video path: nowhere does not exist" in capsys.readouterr().out


def test_letters_by_likelihood(task):
    model = loaded(task, letters="likelihood", batch_size=4)
    answers = model.generate_until(task.requests())
    assert answers[:2] == ["circle", "down"]  # of questions without letters the answer is generated
    pipe = model.pipeline
    best = pipe(video=str(task.docs[2]["video"]), question=task.docs[2]["question"], choices=["A", "B"])[0]["answer"]
    assert answers[2] == best


def test_options_by_likelihood(task):
    """As lmms-eval wants them: the least is the best."""
    from lmms_eval.api.instance import unwrap_generation_output

    model = loaded(task, simple=True)
    task = Task(task.docs[:2])
    losses = [unwrap_generation_output(pair)[0] for pair in model.loglikelihood(task.options())]
    assert len(losses) == 5 and all(greedy is None for _, greedy in losses)
    assert min(range(3), key=lambda n: losses[n][0]) == 0  # circle
    assert losses[4][0] < losses[3][0]  # down
    (first, *_) = model.pipeline(
        video=str(task.docs[0]["video"]), question="What shape flashes up?", choices=["circle", "star", "cross"]
    )
    assert losses[0][0] == pytest.approx(-first["log_likelihood"], abs=1e-5)
    asked = [
        instance("generate_until", ("What shape flashes up?", {"max_new_tokens": 4}, see, 0, "t", "test"), 0, "t")
        for see in [lambda doc: [str(doc["video"])]]
    ]
    assert model.generate_until(asked) == ["circle"]


def test_how_an_answer_is_made(task, monkeypatch):
    model, seen = loaded(task, num_frames=8, max_new_tokens=2, system_prompt="Be brief."), []
    generate = model.pipeline.model.generate

    def note(**kwargs):
        seen.append(kwargs)
        return generate(**kwargs)

    monkeypatch.setattr(model.pipeline.model, "generate", note)
    one = Task(task.docs[:1])
    model.generate_until(one.requests({"max_new_tokens": 9, "top_p": 1.0, "image_aspect_ratio": "pad"}))
    (first,) = seen
    assert first["max_new_tokens"] == 2 and first["do_sample"] is False and first["num_frames"].tolist() == [8]
    assert not {"temperature", "top_p", "image_aspect_ratio"} & first.keys()
    assert "Be brief." in model.pipeline.tokenizer.decode(first["input_ids"][0])
    plain = loaded(one)
    assert plain._settings({"temperature": 0.5})["do_sample"] is True
    assert plain._settings({"temperature": 0.5, "do_sample": False}) == {"do_sample": False}
    assert plain._settings({"num_frames": 4, "temperature": 0})["num_frames"] == 4
    assert model._settings({"num_frames": 4})["num_frames"] == 8
    until = loaded(one).generate_until(one.requests({"until": "rcl"}))
    assert until == ["ci"]


def test_a_run_that_was_stopped_goes_on(task, tmp_path):
    record = tmp_path / "record.jsonl"
    asked = Task(task.docs[:2])
    answers = loaded(asked, record=record).generate_until(asked.requests())
    lines = record.read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == answers
    changed = {**json.loads(lines[0]), "answer": "from the record"}
    record.write_text(json.dumps(changed) + "\n" + lines[1][:30])  # killed here
    again = loaded(asked, record=record).generate_until(asked.requests())
    assert again == ["from the record", answers[1]]
    # Nothing of a run with other settings, or without an answer.
    record.write_text(json.dumps(changed) + "\n")
    assert loaded(asked, record=record, num_frames=8).generate_until(asked.requests())[0] != "from the record"
    failed = {**changed, "answer": "", "error": "no memory"}
    record.write_text(json.dumps(failed) + "\n")
    assert loaded(asked, record=record).generate_until(asked.requests()) == answers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 3}, "--model_args has frames, which --model linvt does not know"),
        ({"letters": "guess"}, "letters is 'guess'"),
        ({"quantize": "2bit"}, "quantize is '2bit'; it is one of 4bit, 8bit"),
    ],
)
def test_one_sentence(task, arguments, message):
    with pytest.raises(ValueError, match=message):
        loaded(task, **arguments)


def test_what_a_chat_model_is_not_asked(task, monkeypatch):
    model = loaded(task)
    with pytest.raises(NotImplementedError, match="--force_simple"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but accelerate knows of 1"):
        loaded(task)
