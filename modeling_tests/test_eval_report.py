"""What is made of a run's answers: scores, verdicts, tables, files for the Hub, and comparisons."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from linvt_hf.cli import _parser
from linvt_hf.evaluation import run as run_module
from linvt_hf.evaluation.judge import Verdict
from linvt_hf.evaluation.report import (
    PUBLISHED,
    beside_published,
    compare_runs,
    comparison_table,
    published,
    table,
    write_eval_results,
)
from linvt_hf.evaluation.run import TASKS, EvalSettings, judge_answers, lmms_eval_command
from linvt_hf.evaluation.scores import Answered, number_of, read_answers, read_run, score_tasks, write_answers
from linvt_hf.evaluation.tasks.task_functions import choice, question


def answered(number, score, video="v", task="t", **kwargs):
    about = {"question": f"q{number}", "videos": [video], "frame_times": [[0.0]], "target": "dog", "answer": "dog"}
    return Answered(task, number, **{**about, "scores": {"exact_match": score}, **kwargs})


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (True, 1.0),
        (0.5, 0.5),
        (4, 4.0),
        ({"pred_answer": "(B)", "gt_answer": "B", "score": 1}, 1.0),  # MVBench
        ({"pred": 2, "ground_truth": "2"}, 1.0),  # EgoSchema
        ({"question_id": "x", "task_type": "y", "pred_answer": "A", "answer": "B"}, 0.0),  # MLVU
        ({"id": 1, "answer": "c", "parsed_pred": "C"}, 1.0),  # LongVideoBench
        ({"rating": 1, "match_success": False}, 1.0),  # TempCompass
        ({"Correctness": "yes", "score": 4}, 1.0),  # ActivityNet-QA
        ({"Correctness": "no", "score": 1}, 0.0),
        ({"ego1": 3}, None),  # what is to be sent in
        ("text", None),
        (None, None),
    ],
)
def test_what_tasks_call_right(value, number):
    assert number_of(value) == number


def lmms_run(folder: Path, samples: list[dict], results: dict, date: str = "20260101_000000") -> None:
    """Files as lmms-eval writes them."""
    home = folder / "some__model"
    home.mkdir(parents=True, exist_ok=True)
    (home / f"{date}_results.json").write_text(json.dumps(results))
    for task in {sample["task"] for sample in samples}:
        lines = [json.dumps({k: v for k, v in sample.items() if k != "task"}) for sample in samples]
        mine = [line for line, sample in zip(lines, samples, strict=True) if sample["task"] == task]
        (home / f"{date}_samples_{task}.jsonl").write_text("\n".join(mine) + "\n")


def sample(number, task="a", **metrics):
    return {"task": task, "doc_id": number, "target": "B", "filtered_resps": "B.", "doc_hash": "0", **metrics}


def test_groups_are_means_over_tasks(tmp_path):
    samples = [
        *[sample(n, "a", acc={"pred_answer": "B.", "gt_answer": "B", "score": 1}) for n in range(2)],
        *[sample(n, "b", acc={"pred_answer": "", "gt_answer": "B", "score": 0}) for n in range(6)],
    ]
    results = {"results": {"a": {"acc,none": 100.0}, "b": {"acc,none": 0}}, "group_subtasks": {"g": ["a", "b"]}}
    lmms_run(tmp_path, [sample(0, "a", acc=False)], {}, "20250101_000000")  # an earlier one
    lmms_run(tmp_path, samples, results)
    scores = {score.task: score for score in score_tasks(read_run(tmp_path), results)}
    assert [scores[name].interval.mean for name in "abg"] == [1.0, 0.0, 0.5]
    assert (scores["g"].questions, scores["g"].unclear, scores["b"].unclear) == (8, 6, 6)
    assert (scores["a"].reported, scores["g"].reported) == (100.0, None)
    assert "| g | acc | 50.0 | 50.0 to 50.0 | 8 | 0 | 6 |" in table(list(scores.values()))


def test_no_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results of lmms-eval"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no answers.jsonl in"):
        read_answers(tmp_path)


def test_answers_are_kept_as_they_were(tmp_path):
    answers = [answered(0, 1.0), answered(1, 0.0, error="no video", unclear=True, parsed=None)]
    write_answers(answers, tmp_path / "answers.jsonl")
    assert read_answers(tmp_path) == answers


class FakeJudge:
    model = "some-judge"

    def __init__(self, *verdicts):
        self.said, self.asked = list(verdicts), []

    def verdicts(self, asked):
        for one in asked:
            self.asked.append(one)
            yield self.said.pop(0)


def test_verdicts_are_kept_and_those_without_are_left_out(tmp_path):
    open_one = {"exact_match": 0.0, "contains": 0.0}
    answers = [answered(n, 0.0, answer=f"answer {n}", scores=open_one) for n in range(3)]
    judge = FakeJudge(Verdict(True, 4), Verdict(error="The judge does not answer"), Verdict(False, 1))
    found, about = judge_answers(judge, answers, tmp_path / "judge.jsonl")
    assert judge.asked[0] == ("q0", "dog", "answer 0")
    assert [answer.scores.get("judge_score") for answer in found] == [4.0, None, 1.0]
    assert about == {
        "judge": "some-judge",
        "judge_accuracy": 0.5,
        "judge_score": 2.5,
        "judged": 2,
        "unjudged": 1,
        "reasons": ["The judge does not answer"],
    }
    scores = {score.metric: score for score in score_tasks(found)}
    assert scores["judge_accuracy"].questions == 2 and scores["exact_match"].questions == 3
    assert "| t | judge_score | 2.50 |" in table(list(scores.values()))
    again = FakeJudge(Verdict(True, 5))
    found, about = judge_answers(again, answers, tmp_path / "judge.jsonl")
    assert len(again.asked) == 1 and about["judged"] == 3  # only what had no verdict is asked again
    other = FakeJudge(*[Verdict(True, 5)] * 3)
    other.model = "another"
    judge_answers(other, answers, tmp_path / "judge.jsonl")
    assert len(other.asked) == 3
    silent = FakeJudge(*[Verdict(error="The judge does not answer")] * 3)
    silent.model = "silent"
    assert not judge_answers(silent, found, tmp_path / "judge.jsonl")[0][0].scores.keys() & {"judge_accuracy"}


def test_a_verdict_is_of_one_question_of_one_task(tmp_path):
    """The tasks of a group share a file, and some of them have rules that need no judge."""
    open_one = {"contains": 0.0}
    answers = [
        answered(0, 0.0, task="one", scores=open_one),
        answered(0, 0.0, task="two", target="cat", scores=open_one),
    ]
    answers.append(answered(1, 1.0, task="letters"))
    for _ in range(2):
        judge = FakeJudge(Verdict(True, 5), Verdict(False, 0))
        found, _ = judge_answers(judge, answers, tmp_path / "judge.jsonl")
        assert [answer.scores.get("judge_accuracy") for answer in found] == [1.0, 0.0, None]
    assert judge.asked == []


def test_an_answer_may_hold_any_end_of_a_line(tmp_path):
    answers = [answered(0, 1.0, answer="a\u2028dog\x85\u2029")]
    write_answers(answers, tmp_path / "answers.jsonl")
    assert read_answers(tmp_path) == answers


def test_the_hub_reads_its_results(tmp_path):
    scores = score_tasks([answered(n, float(n < 3)) for n in range(4)])
    (file,) = write_eval_results(scores, {"t": "some/dataset", "u": "other/dataset"}, "num_frames 16", tmp_path)
    assert file == tmp_path / ".eval_results/t.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("some/dataset", "t", 75.0)
    assert entry.notes.startswith("exact_match, 95 %: ") and entry.notes.endswith("4 questions; num_frames 16")


def test_published_figures_stand_beside_ours():
    figures = published()
    assert {figure.value for figure in figures if figure.model.startswith("LinVT") and figure.task == "mvbench"} == {
        69.3
    }
    assert all(figure.source.startswith("https://") for figure in figures)
    assert all(0 < figure.value <= (5 if figure.metric == "judge_score" else 100) for figure in figures)
    scores = score_tasks([answered(n, float(n < 3), task="msvd_qa") for n in range(4)])
    text = beside_published(scores)
    assert "80.2" in text and "second hand; judge and split unknown" in text
    assert "this run" not in text  # exact match is not what a judge says
    judged = [answered(0, 0.0, task="msvd_qa", scores={"judge_accuracy": 1.0, "judge_score": 4.0})]
    text = beside_published(score_tasks(judged))
    assert "| MSVD-QA | **this run**, judge_accuracy | 100.0 | 100.0 to 100.0, 1 questions |" in text
    assert "**this run**, judge_score | 4.00 |" in text
    text = beside_published(score_tasks([answered(0, 1.0, task="mvbench", scores={"mvbench_accuracy": 1.0})]))
    assert "**this run**, mvbench_accuracy | 100.0" in text and "LinVT-Qwen2-VL-7B, accuracy | 69.3" in text
    assert beside_published(score_tasks([answered(0, 1.0)])).startswith("No figures are published")
    assert "read in november 2026" in " ".join(PUBLISHED.read_text().lower().split())


def test_every_published_task_is_one_that_can_be_run():
    ours = {path.stem for path in TASKS.glob("*.yaml")}
    # Not imported: lmms-eval's tasks let Pillow take broken images for whole ones, in all of a process.
    theirs = Path(importlib.util.find_spec("lmms_eval").submodule_search_locations[0]) / "tasks"
    for task in {figure.task for figure in published()} - ours:
        found = [path for path in theirs.rglob("*.yaml") if f": {task}\n" in path.read_text().replace('"', "")]
        assert found, task


def test_two_runs_on_the_questions_they_share():
    first = [answered(n, float(n < 5), video=f"v{n}") for n in range(10)]
    second = [answered(n, float(n < 9), video=f"v{n}") for n in range(2, 12)]
    second[0] = answered(2, 1.0, question="another question")
    (compared,) = compare_runs(first, second)
    assert compared.found.questions == 7 and compared.first == pytest.approx(2 / 7)
    assert compared.found.difference.mean == pytest.approx(4 / 7)
    assert "| t | exact_match | 28.6 | 85.7 | 57.1 |" in comparison_table([compared])
    with pytest.raises(ValueError, match="no question in common"):
        compare_runs(first, [answered(0, 1.0, task="u")])


def test_the_command_is_one_that_could_be_typed(tmp_path):
    settings = EvalSettings("some/model", num_frames=8, limit=5, extra=("--verbosity", "DEBUG"))
    command = lmms_eval_command(settings, "mvbench", tmp_path, batch_size=4)
    text = " ".join(command)
    assert "-m lmms_eval --model linvt --model_args pretrained=some/model,dtype=auto,num_frames=8" in text
    assert "--tasks mvbench" in text and "--limit 5" in text and text.endswith("--verbosity DEBUG")
    assert "torch.distributed.run" in lmms_eval_command(settings, "mvbench", tmp_path, processes=2)
    with pytest.raises(ValueError, match="holds a comma"):
        lmms_eval_command(EvalSettings("a,b"), "mvbench", tmp_path)


def test_a_run_of_several_tasks(tmp_path, monkeypatch):
    """One whose answers a judge reads, one without its data, one of which no question can be answered."""
    said, started = [], []

    def run_task(settings, task, folder, processes, batch_size, data):
        started.append((task, processes, batch_size, data))
        if task == "absent":
            return "There is no test_qa.json"
        metrics = {"exact_match": 0.0, "contains": 1.0, "question": "Who?"}
        config = {task: {"dataset_path": "json" if task == "open" else "some/dataset"}}
        samples = [sample(n, task, **metrics, parsed="B.") for n in range(2)]
        lmms_run(folder, samples, {"results": {task: {"contains,none": 1.0}}, "configs": config})
        lines = [
            {"task": task, "split": "test", "doc_id": n, "question": "Who? One word.", "videos": ["v"]}
            | {"frame_times": [[0.0]], "answer": "B.", "error": "no video" if task == "blind" else None}
            for n in range(2)
        ]
        (folder / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return None

    monkeypatch.setattr(run_module, "_run_task", run_task)
    judge = FakeJudge(Verdict(True, 4), Verdict(False, 0), *[Verdict(True, 5)] * 2)
    asked = {"processes": 2, "batch_size": 4, "data": Path("d"), "say": said.append}
    run = run_module.evaluate(EvalSettings("m"), ["open", "absent", "blind", "hub"], tmp_path, judge=judge, **asked)
    assert started[0] == ("open", 2, 4, Path("d"))
    assert judge.asked[:2] == [("Who?", "B", "B.")] * 2
    assert run.failed == {
        "absent": "There is no test_qa.json",
        "blind": "none of 2 questions could be answered: no video",
    }
    assert run.judge["open"]["judge_accuracy"] == 0.5
    assert [(score.metric, score.interval.mean) for score in run.scores if score.task == "open"] == [
        ("exact_match", 0.0),
        ("contains", 1.0),
        ("judge_accuracy", 0.5),
        ("judge_score", 2.0),
    ]
    assert json.loads((tmp_path / "results.json").read_text())["judge"]["open"]["judge"] == "some-judge"
    report = (tmp_path / "report.md").read_text()
    assert "Judge: some-judge." in report and "No result for blind: none of 2 questions" in report
    assert [file.name for file in (tmp_path / ".eval_results").iterdir()] == ["hub.yaml"]
    # Again without a judge: what it said is still there, and only what has no result is run.
    started.clear()
    again = run_module.evaluate(EvalSettings("m"), ["open", "blind"], tmp_path, say=said.append)
    assert [task for task, *_ in started] == ["blind"]
    assert "judge_accuracy" in {score.metric for score in again.scores}


def test_without_lmms_eval(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps 'lmms-eval"):
        run_module.evaluate(EvalSettings("m"), ["t"], tmp_path)


def test_a_question_without_options_is_asked_and_counted():
    doc = {"question": "Which?", "options": [], "answer": 1, "video": "v.mp4"}
    assert question(doc) == "Which?"
    assert choice(doc, ["B"]) == {"accuracy": 0.0, "parsed": None}


def test_what_follows_goes_to_lmms_eval():
    command = [
        "eval",
        "m",
        "--tasks",
        "a,b",
        "--output",
        "o",
        "--limit",
        "3",
        "--lmms-eval",
        "--force_simple",
        "--seed",
        "1",
    ]
    args = _parser().parse_args(command)
    assert (args.tasks, args.limit, args.extra) == ("a,b", 3, ["--force_simple", "--seed", "1"])
    assert _parser().parse_args(command[:6]).extra == []
