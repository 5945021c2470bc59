"""The judge of open answers, against a server that speaks OpenAI's protocol, well and badly."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from linvt_hf.evaluation import judge as judge_module
from linvt_hf.evaluation.judge import Judge, Verdict, judged, read_verdict


@pytest.fixture
def server():
    """`replies` is what a server says to a task; a number is an HTTP status, and what is no text a body of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append(body)
                reply = replies(body["messages"][1]["content"], len(asked))
            if isinstance(reply, int):
                self.send_error(reply)
                return
            message = {"role": "assistant", "content": reply}
            whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
            whole["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
            content = json.dumps(reply if isinstance(reply, dict) else whole).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    asked, lock, replies = [], threading.Lock(), None

    def start(answer, **kwargs) -> tuple[Judge, list]:
        nonlocal replies
        replies = answer
        url = f"http://127.0.0.1:{running.server_port}/v1"
        return Judge(url, "small-judge", **{"timeout": 5, **kwargs}), asked

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield start
    running.shutdown()


def test_each_answer_gets_its_own_verdict(server):
    def reply(task, _):
        right = "Predicted answer: dog" in task
        return json.dumps({"pred": "yes" if right else "no", "score": 5 if right else 1})

    judge, asked = server(reply, key="secret")
    predictions = ["dog", "cat", "dog", " ", "cow"]
    verdicts = list(judge.verdicts(("Who?", "dog", said) for said in predictions))
    assert [verdict.correct for verdict in verdicts] == [True, False, True, False, False]
    assert [verdict.score for verdict in verdicts] == [5, 1, 5, 0, 1]
    assert len(asked) == 4  # nothing was asked about nothing
    assert asked[0]["model"] == "small-judge" and asked[0]["temperature"] == 0
    assert judged(verdicts) == {"judge_accuracy": 0.4, "judge_score": 12 / 5, "judged": 5, "unjudged": 0}


@pytest.mark.parametrize(
    ("reply", "correct", "score"),
    [
        ('{"pred": "yes", "score": 4}', True, 4),
        ("{'pred': 'no', 'score': 0}", False, 0),
        ("```json\n{'pred': 'Yes', 'score': 4.8}\n```", True, 4),
        ('Here you are: {"score": "3", "pred": "no"}.', False, 3),
        ('{"pred": "yes", "score": 7}', None, None),
        ('{"pred": "yes", "score": 5.5}', None, None),
        ('{"pred": "maybe", "score": 3}', None, None),
        ('{"pred": "yes"}', None, None),
        ("It is correct.", None, None),
        ("", None, None),
    ],
)
def test_what_a_reply_says(reply, correct, score):
    verdict = read_verdict(reply)
    assert (verdict.correct, verdict.score) == (correct, score)
    assert (verdict.error is None) == (correct is not None)


def test_nonsense_is_asked_again_and_then_counted(server):
    judge, asked = server(lambda task, number: "hm" if number < 3 else '{"pred": "yes", "score": 5}')
    assert judge.verdict("Who?", "dog", "dog").correct and len(asked) == 3
    judge, asked = server(lambda task, _: "I would rather not say.")
    asked.clear()
    verdict = judge.verdict("Who?", "dog", "dog")
    assert verdict.correct is None and len(asked) == 3
    assert verdict.error == """The judge's reply cannot be read: "I would rather not say.\""""
    assert judged([verdict, Verdict(correct=True, score=4)]) == {
        "judge_accuracy": 1.0,
        "judge_score": 4.0,
        "judged": 1,
        "unjudged": 1,
    }
    assert judged([verdict]) == {"judged": 0, "unjudged": 1}


@pytest.mark.parametrize("reply", [401, {"error": "nothing here"}, {"choices": []}])
def test_a_judge_that_does_not_answer_is_given_up(server, monkeypatch, reply):
    monkeypatch.setattr(judge_module, "GIVE_UP", 3)
    judge, asked = server(lambda task, _: reply, at_once=1)
    verdicts = list(judge.verdicts([("Who?", "dog", "dog")] * 6))
    assert [verdict.correct for verdict in verdicts] == [None] * 6 and len(asked) == 3
    assert verdicts[0].error.startswith("The judge does not answer: ")
    assert verdicts[-1].error == "The judge was given up: 3 requests in a row had no reply."


def test_no_judge_at_all():
    judge = Judge("http://127.0.0.1:9/v1", "m", timeout=1, tries=1)
    assert judge.verdict("Who?", "dog", "dog").error.startswith("The judge does not answer: Connection error")
