"""`linvt serve` on loopback, asked by OpenAI's own client."""

import base64
import contextlib
import functools
import http.client
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("av", reason="reading video files needs PyAV")
openai = pytest.importorskip("openai", reason="the client that the server is for")
uvicorn = pytest.importorskip("uvicorn", reason="a server needs the extra serve")

from linvt_hf.asking.loading import load_pipeline  # noqa: E402
from linvt_hf.cli import main  # noqa: E402
from linvt_hf.serving.app import ServerSettings, create_app  # noqa: E402
from linvt_hf.serving.engine import Engine  # noqa: E402
from linvt_hf.shapes.videos import write_split  # noqa: E402

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples/linvt-shapes"
VIDEO = MODEL / "example.mp4"
WORDS = "What shape flashes up?"


def data_url(data, kind="video/mp4"):
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def chat(url, words=WORDS):
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": words}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(MODEL)


@pytest.fixture(scope="module")
def answer(pipeline):
    return pipeline(video=str(VIDEO), question=WORDS, max_new_tokens=20)[0]["answer"]


@pytest.fixture(scope="module")
def start(pipeline):
    """A function from settings to a server in this process: its port, and its engine."""
    with contextlib.ExitStack() as running:

        def run(**settings):
            engine = Engine(pipeline, **{name: settings.pop(name) for name in ("max_waiting",) if name in settings})
            app = create_app(engine, ServerSettings("shapes", **settings))
            server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
            thread = threading.Thread(target=server.run)
            thread.start()
            running.callback(thread.join)
            running.callback(setattr, server, "should_exit", True)
            while not server.started:
                time.sleep(0.01)
            return server.servers[0].sockets[0].getsockname()[1], engine

        yield run


@pytest.fixture(scope="module")
def server(start):
    return start()


@pytest.fixture(scope="module")
def client(server):
    return client_of(server[0])


def large() -> dict:
    """An image of a few thousand bytes and 25 million pixels."""
    file = io.BytesIO()
    Image.new("1", (5000, 5000)).save(file, "PNG")
    return {"type": "image_url", "image_url": {"url": data_url(file.getvalue(), "image/png")}}


LARGE = large()


def client_of(port, key="any"):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)


def create(client, messages, **settings):
    return client.chat.completions.create(
        model="shapes", messages=messages, **{"temperature": 0, "max_tokens": 20, **settings}
    )


def refused(client, messages, **settings):
    """The status and the sentence."""
    with pytest.raises(openai.APIStatusError) as caught:
        create(client, messages, **settings)
    return caught.value.status_code, caught.value.body["message"]


def test_an_answer_whole_and_in_pieces(client, answer):
    messages = chat(data_url(VIDEO.read_bytes()))
    whole = create(client, messages)
    assert whole.choices[0].message.content == answer and whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    *pieces, last = create(client, messages, stream=True, stream_options={"include_usage": True})
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer
    assert pieces[-1].choices[0].finish_reason == "stop" and last.usage == whole.usage
    assert len({piece.id for piece in [*pieces, last]}) == 1


def test_chats_of_several_turns_texts_and_pictures(client, pipeline):
    picture = io.BytesIO()
    with Image.open(ROOT / "docs/pictures/1/heat.png") as image:
        image.convert("RGB").resize((64, 64)).save(picture, "PNG")
    turns = [
        *chat(data_url(VIDEO.read_bytes())),
        {"role": "assistant", "content": "circle"},
        {"role": "user", "content": "Which way does the yellow cross move?"},
    ]
    ours = [
        {
            "role": "user",
            "content": [{"type": "video", "video": str(VIDEO)}, {"type": "text", "text": WORDS}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "circle"}]},
        {"role": "user", "content": [{"type": "text", "text": "Which way does the yellow cross move?"}]},
    ]
    expected = pipeline({"messages": ours}, max_new_tokens=20)[0]["answer"]
    assert create(client, turns).choices[0].message.content == expected
    question = {"type": "text", "text": "How many shapes are there?"}
    shown = {"type": "image_url", "image_url": {"url": data_url(picture.getvalue(), "image/png"), "detail": "low"}}
    said = create(client, [{"role": "user", "content": [shown, question]}])
    with Image.open(picture) as image:
        ours = [{"role": "user", "content": [{"type": "image", "image": image.convert("RGB")}, question]}]
        assert said.choices[0].message.content == pipeline({"messages": ours}, max_new_tokens=20)[0]["answer"]
    assert create(client, [{"role": "user", "content": "What?"}]).choices[0].message.content is not None


def test_settings_are_followed(client, answer):
    messages = chat(data_url(VIDEO.read_bytes()))
    short = create(client, messages, max_tokens=1)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 1
    assert create(client, messages, stop=[answer[2:]]).choices[0].message.content == answer[:2]
    sampled = [create(client, messages, temperature=2, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3)]
    assert sampled[0] == sampled[1] and len(set(sampled)) > 1
    fewer = create(client, messages, extra_body={"num_frames": 4})
    assert fewer.usage.prompt_tokens == short.usage.prompt_tokens  # LinVT's tokens are as many
    assert create(client, messages, n=1, tools=[], user="me", frequency_penalty=0).choices


@pytest.mark.parametrize(
    ("settings", "status", "said"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools is not supported"),
        ({"n": 2}, 400, "n is not supported"),
        ({"logprobs": True}, 400, "logprobs is not supported"),
        ({"temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
        ({"extra_body": {"num_frame": 8}}, 400, "There is no setting num_frame."),
        ({"extra_body": {"num_frames": 10_000}}, 400, "num_frames is 10000, and 256 is the most here."),
        ({"max_tokens": 5000}, 400, "max_tokens is 5000, and 1024 is the most here."),
        ({"extra_body": {"model": "other"}}, 404, "There is no model 'other' here, only 'shapes'."),
        ({"stop": ["a"] * 5}, 400, "stop holds 5 texts of up to 1 characters; 4 of 1000 are the most."),
        ({"stop": "a" * 10**6}, 400, "stop holds 1 texts of up to 1000000 characters; 4 of 1000 are the most."),
        ({"extra_body": {"messages": []}}, 400, "messages: List should have at least 1 item"),
    ],
)
def test_what_is_refused(client, settings, status, said):
    found = refused(client, chat(data_url(VIDEO.read_bytes())), **settings)
    assert found[0] == status and said in found[1]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (chat("ftp://example.org/x.mp4"), "A url must be an http(s):// or a data: URL"),
        (chat(str(VIDEO)), "this server opens nothing else"),
        (chat(VIDEO.as_uri()), "this server opens nothing else"),
        (chat("http://127.0.0.1:9/x.mp4?token=secret"), "its server is at a private address"),
        (chat("http://localhost/x.mp4"), "its server is at a private address"),
        (chat("http://169.254.169.254/latest/meta-data"), "its server is at a private address"),
        (chat("http://[::1]/x.mp4"), "its server is at a private address"),
        (chat("http://[/x.mp4"), "cannot be fetched"),
        (chat(" http://127.0.0.1:9/*"), "this server opens nothing else"),
        (chat("data:video/mp4;base64,!!"), "is not base64 as it says"),
        (chat(data_url(b"")), "holds nothing"),
        (chat(data_url(b"no video")), "the data: URL cannot be read as a video"),
        (chat(data_url(VIDEO.read_bytes()[:2000])), "the data: URL"),
        (chat(data_url(VIDEO.read_bytes()), " "), "A question has no words"),
        (chat(data_url(VIDEO.read_bytes()), "<|linvt_video|>?"), "placeholders"),
        (chat(data_url(VIDEO.read_bytes())) * 17, "The request has 17 videos and images, and 16 are the most."),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(b"x")}}]}], "an image"),
        (
            [{"role": "user", "content": [LARGE] * 3}],
            "The request's images have 75,000,000 pixels up to one of 5000 x 5000",
        ),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "Who?"}]}],
            "messages.0.content.0: Input tag 'input_",
        ),
        ([{"role": "user", "content": [{"type": "video_url", "video_url": "x"}]}], "content.0.video_url.video_url: "),
        ([{"role": "user", "content": 3}], "messages.0.content: Input should be a valid string."),
    ],
)
def test_requests_that_cannot_be_answered(client, answer, messages, said):
    status, sentence = refused(client, messages)
    assert status == 400 and said in sentence
    assert "secret" not in sentence and tempfile.gettempdir() not in sentence and "\n" not in sentence
    assert create(client, chat(data_url(VIDEO.read_bytes()))).choices[0].message.content == answer


def test_files_of_one_folder_may_be_allowed(start, answer, tmp_path):
    shared, secret = tmp_path / "shared", tmp_path / "secret.mp4"
    shared.mkdir()
    for file in (shared / "a.mp4", secret):
        file.write_bytes(VIDEO.read_bytes())
    (shared / "link.mp4").symlink_to(secret)
    (shared / "broken.mp4").write_bytes(b"no video")
    client = client_of(start(allow_files=shared)[0])
    for url in ("a.mp4", str(shared / "a.mp4"), (shared / "a.mp4").as_uri()):
        assert create(client, chat(url)).choices[0].message.content == answer
    for url in ("../secret.mp4", str(secret), secret.as_uri(), "link.mp4", "/etc/passwd", "none.mp4", "."):
        assert refused(client, chat(url))[1].startswith("A path must be of a file in the folder")
    status, sentence = refused(client, chat("broken.mp4"))
    assert sentence.startswith("'broken.mp4' cannot be read") and str(tmp_path) not in sentence


def test_private_servers_may_be_allowed(start, answer):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(MODEL))
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever).start()
        url = f"http://127.0.0.1:{files.server_port}/example.mp4"
        client = client_of(start(allow_private=True)[0])
        assert create(client, chat(url)).choices[0].message.content == answer
        assert "the server says 404" in refused(client, chat(url + "x"))[1]
        small = client_of(start(allow_private=True, max_video_mb=0.001)[0])
        assert "took more than limits.download_bytes" in refused(small, chat(url))[1]
        files.shutdown()


def test_models_health_and_what_is_no_request(server, client):
    assert [model.id for model in client.models.list()] == ["shapes"] and client.models.retrieve("shapes").id
    with pytest.raises(openai.NotFoundError, match="There is no model 'x'"):
        client.models.retrieve("x")
    assert ask(server[0], "GET", "/health") == (200, {"status": "ok", "requests": 0, "answering": 0, "waiting": 0})
    kind = {"Content-Type": "application/json"}
    assert ask(server[0], "POST", "/v1/chat/completions", b"{", kind)[0] == 400
    assert ask(server[0], "POST", "/v1/chat/completions", b"{}", {"Content-Type": "text/plain"})[0] == 415


def ask(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers or {})
    with connection.getresponse() as response:
        return response.status, json.loads(response.read())


def test_keys_and_sizes(start, answer):
    port, _ = start(api_key="secret", max_body_mb=0.02, max_video_mb=0.01)
    messages = chat(data_url(VIDEO.read_bytes()))
    for key in ("wrong", "secre"):
        assert refused(client_of(port, key), messages) == (401, "The API key is missing or wrong.")
    client = client_of(port, "secret")
    assert refused(client, chat(data_url(bytes(20_000))))[0] == 413
    assert "holds more than limits.download_bytes" in refused(client, chat(data_url(bytes(12_000))))[1]
    assert ask(port, "GET", "/health")[0] == 200


def test_one_request_too_many(start, answer):
    port, engine = start(max_requests=2)
    client, hold = client_of(port), threading.Event()
    engine.run(lambda pipeline: hold.wait())
    with ThreadPoolExecutor(2) as pool:
        first = [pool.submit(create, client, chat(data_url(VIDEO.read_bytes()))) for _ in range(2)]
        while engine.waiting < 2:
            time.sleep(0.01)
        assert refused(client, chat(data_url(VIDEO.read_bytes())))[0] == 429
        hold.set()
        assert [each.result().choices[0].message.content for each in first] == [answer] * 2


def test_who_waits_too_long(start):
    port, engine = start(answer_seconds=0.2)
    hold = threading.Event()
    engine.run(lambda pipeline: hold.wait(2))
    assert refused(client_of(port), chat(data_url(VIDEO.read_bytes()))) == (
        504,
        "There was no whole answer within 0.2 s.",
    )


def test_who_goes_away_takes_nothing_along(start, answer, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    port, engine = start()
    hold = threading.Event()
    engine.run(lambda pipeline: hold.wait())
    impatient = client_of(port).with_options(timeout=0.5)
    for stream in (False, True):
        with pytest.raises(openai.APITimeoutError):
            create(impatient, chat(data_url(VIDEO.read_bytes())), stream=stream)
    for _ in range(100):
        if ask(port, "GET", "/health")[1]["requests"] == 0:
            break
        time.sleep(0.05)
    hold.set()
    assert create(client_of(port), chat(data_url(VIDEO.read_bytes()))).choices[0].message.content == answer
    assert not any(tmp_path.iterdir()) and ask(port, "GET", "/health")[1]["requests"] == 0


def test_fifty_at_once(start, pipeline, tmp_path, monkeypatch):
    """Of several videos, some of which are broken, whole and in pieces: every one gets its own answer."""
    (questions, *_) = [file for file in write_split(tmp_path, "video", "test", 6) if "captions" not in file.name]
    requests = []
    for line in questions.read_text().splitlines():
        video, words = json.loads(line)["messages"][0]["content"]
        expected = pipeline(video=str(tmp_path / video["video"]), question=words["text"], max_new_tokens=20)
        requests.append(((tmp_path / video["video"]).read_bytes(), words["text"], expected[0]["answer"]))
    assert len({data for data, *_ in requests}) == 6 and len({expected for *_, expected in requests}) > 5
    broken = [(b"no video", WORDS, None), (VIDEO.read_bytes()[:3000], WORDS, None)] * 2
    requests = (requests * 50)[: 50 - len(broken)] + broken
    port, engine = start()
    client, folders = client_of(port), tmp_path / "folders"
    folders.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folders))

    def one(number):
        data, words, expected = requests[number]
        try:
            reply = create(client, chat(data_url(data), words), stream=number % 2 == 0)
            if number % 2 == 0:
                return expected, "".join(piece.choices[0].delta.content or "" for piece in reply)
            return expected, reply.choices[0].message.content
        except openai.BadRequestError as error:
            return expected, None if "the data: URL" in error.body["message"] else error

    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(one, range(50)))
    assert Counter(expected == said for expected, said in results) == {True: 50}
    assert not any(folders.iterdir()) and (engine.waiting, engine.answering) == (0, 0)


def test_as_a_program(answer):
    """It starts, answers, and stops when it is told to, an answer that has begun first."""
    command = [sys.executable, "-m", "linvt_hf.cli", "serve", str(MODEL), "--port", "0", "--name", "shapes"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        said = ""
        while "serving shapes" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        port = int(re.search(r"serving shapes at http://127.0.0.1:(\d+)/v1", said)[1])
        messages = chat(data_url(VIDEO.read_bytes()))
        stream = iter(create(client_of(port), messages, stream=True, temperature=2, seed=1, max_tokens=100))
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason in ("stop", "length")
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    with pytest.raises(openai.APIConnectionError):
        create(client_of(port), messages)


def test_mistakes_of_whoever_starts_it(server, capsys):
    assert main(["serve", str(MODEL), "--port", str(server[0])]) == 2
    assert f"Nothing can listen at 127.0.0.1, port {server[0]}" in capsys.readouterr().err
    assert main(["serve", str(MODEL), "--port", "0", "--allow-files", "nowhere"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
    assert main(["serve", str(MODEL), "--port", "0", "--max-frames", "0"]) == 2
    assert "--max-frames is 0; it must be above 0." in capsys.readouterr().err
