"""The page of `examples/space`, as the Space that `make space-folder` makes, in a real browser."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from linvt_hf.shapes.videos import write_mp4

pytest.importorskip("gradio", reason="the page needs the extra space")
playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; Debian's package is chromium")

ROOT = Path(__file__).parents[1]
VIDEO = ROOT / "examples/linvt-shapes/example.mp4"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Of a server in a folder of its own, which takes small and short videos alone."""
    folder = tmp_path_factory.mktemp("space") / "space"
    subprocess.run(["make", "--silent", "space-folder", f"SPACE={folder}"], cwd=ROOT, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "tmp"),
        "LINVT_MAX_MEGABYTES": "1",
        "LINVT_MAX_SECONDS": "60",
        "OMP_NUM_THREADS": "1",
    }
    log, command = folder / "log", [sys.executable, "app.py"]
    with log.open("w") as out, subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out) as run:
        try:
            for _ in range(300):
                time.sleep(0.2)
                assert run.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                    break
                except OSError:
                    continue
            yield f"http://127.0.0.1:{port}/"
            assert "Traceback" not in log.read_text()
        finally:
            run.terminate()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, url):
    """A function to a page of a visitor's own."""
    contexts = []

    def one(video=None):
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 1400}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.goto(url)
        page.get_by_role("button", name="Ask", exact=True).wait_for()
        if video is not None:
            upload(page, video)
        return page

    yield one
    for context in contexts:
        context.close()


def upload(page, video):
    page.set_input_files("input[type=file]", str(video))
    page.wait_for_selector("video[src]")


def ask(page, words):
    page.get_by_label("Question").fill(words)
    page.get_by_role("button", name="Ask", exact=True).click()


def bubbles(page):
    return [text.strip() for text in page.locator(".message.bot").all_inner_texts()]


def answered(page, number, answer):
    page.wait_for_function(
        "([number, answer]) => document.querySelectorAll('.message.bot')[number]?.innerText.trim() === answer",
        arg=[number, answer],
    )


def pictures(page):
    """Waits for both, and gives where they come from."""
    sources = []
    for name in ("#timeline img", "#heat img"):
        page.wait_for_function("name => document.querySelector(name)?.naturalWidth > 300", arg=name)
        sources.append(page.locator(name).get_attribute("src"))
    return sources


def test_ask_read_see_and_ask_again(visit, tmp_path):
    page = visit(VIDEO)
    ask(page, "What shape flashes up?")
    answered(page, 0, "circle")
    first = pictures(page)
    shown = os.environ.get("LINVT_SCREENSHOT") or tmp_path / "page.png"
    page.wait_for_timeout(500)
    page.screenshot(path=shown, full_page=True)
    with Image.open(shown) as shot:  # something is drawn: cividis's yellow, for the heaviest moment
        off = np.abs(np.asarray(shot.convert("RGB"), dtype=int) - (253, 231, 55)).sum(axis=-1)
        assert (off < 60).sum() > 500
    ask(page, "Which way does the yellow cross move?")
    answered(page, 1, "down")
    page.wait_for_function(
        "first => ![null, undefined, first].includes(document.querySelector('#heat img')?.src)", arg=first[1]
    )
    assert bubbles(page) == ["circle", "down"] and pictures(page) != first


def test_an_answer_grows_word_by_word(visit):
    page = visit(VIDEO)
    page.evaluate(
        """() => {
            window.seen = []
            new MutationObserver(() => {
                const bubble = document.querySelector('.message.bot')
                if (bubble) seen.push(bubble.innerText.trim())
            }).observe(document.body, {subtree: true, childList: true, characterData: true})
        }"""
    )
    ask(page, "Describe the video.")
    pictures(page)
    seen = list(dict.fromkeys(text for text in json.loads(page.evaluate("JSON.stringify(seen)")) if text))
    *growing, whole = [text for text in seen if text != "..."]
    assert len(growing) > 2 and all(whole.startswith(text) for text in growing) and whole == bubbles(page)[0]


def test_the_example_is_at_hand(visit):
    page = visit()
    page.locator("text=Or take this one").locator("xpath=following::video | following::button").first.click()
    page.wait_for_selector("video[src]")
    ask(page, "What shape flashes up?")
    answered(page, 0, "circle")


def test_visitors_do_not_get_each_others_answers(visit):
    pages = [visit(VIDEO) for _ in range(3)]
    asked = {"What shape flashes up?": "circle", "Which way does the yellow cross move?": "down"}
    order = [list(asked)[number % 2] for number in range(3)]
    for page, words in zip(pages, order, strict=True):
        ask(page, words)
    for page, words in zip(pages, order, strict=True):
        answered(page, 0, asked[words])
        assert len(bubbles(page)) == 1


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("broken", "The video cannot be read as a video"),
        ("large", "exceed the maximum allowed size"),
        ("long", "The video lasts 100 seconds, and 60 seconds are the most here."),
    ],
)
def test_videos_that_are_not_taken(visit, tmp_path, file, said):
    path = tmp_path / f"{file}.mp4"
    if file == "long":
        write_mp4(np.zeros((100, 64, 64, 3), dtype=np.uint8), path, fps=1)
    else:
        path.write_bytes(bytes(2**21) if file == "large" else b"no video")
    page = visit()
    page.set_input_files("input[type=file]", str(path))
    if file != "large":
        page.wait_for_selector("video[src]", state="attached")
        ask(page, "What?")
    page.locator(f"text={said}").first.wait_for()


def test_what_is_missing_is_asked_for(visit):
    page = visit()
    ask(page, "What?")
    page.locator("text=Give a video first.").wait_for()
    upload(page, VIDEO)
    ask(page, " ")
    page.locator("text=Ask something about the video.").wait_for()
