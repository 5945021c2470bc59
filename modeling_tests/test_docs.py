"""The code of README.md and of the pages in docs/ runs as it stands, in order, and what they point at is there."""

import re
import shlex
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from tiny_bases import save_tiny_base

from linvt_hf.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What each page runs: Python blocks, and lines of the command line.
RUNS = {
    "README": (2, 2),
    "costs": (0, 0),
    "evaluating": (0, 2),
    "explaining": (1, 1),
    "method": (1, 0),
    "reading_videos": (1, 0),
    "serving": (1, 2),
    "training": (3, 5),
    "using": (3, 2),
    "wrapping": (2, 2),
}
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block(page, tmp_path, monkeypatch):
    """Where a Hub id stands, a tiny random model of the same architecture takes its place."""
    monkeypatch.chdir(tmp_path)
    for folder in ("examples", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    text = page.read_text(encoding="utf-8")
    if "Qwen/Qwen2-VL-2B-Instruct" in text:
        base = save_tiny_base("qwen2_vl", tmp_path / "image-llm")
        text = text.replace("Qwen/Qwen2-VL-2B-Instruct", str(base))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names: dict = {}
    ran = {"python": 0, "bash": 0}
    with ExitStack() as running:
        for language, block in _BLOCK.findall(text.replace("8000", port)):
            if language == "python":
                exec(compile(block, page.name, "exec"), names)
                ran["python"] += 1
            elif language == "yaml":  # its first line names its file
                Path(block.split()[1]).write_text(block, encoding="utf-8")
            else:
                assert language == "bash", f"{page.name} has a block that nobody runs: {block}"
                for line in block.replace("\\\n", " ").splitlines():
                    if not line.startswith("make "):  # whose targets other tests run
                        run(shlex.split(line), running)
                        ran["bash"] += 1
    assert tuple(ran.values()) == RUNS[page.stem]


def run(command: list[str], running: ExitStack) -> None:
    assert command[0] == "linvt"
    if command[1] != "serve":
        assert main(command[1:]) == 0, command
        return
    server = running.enter_context(
        subprocess.Popen([sys.executable, "-m", "linvt_hf.cli", *command[1:]], stderr=subprocess.PIPE, text=True)
    )
    running.callback(server.terminate)
    assert any("serving" in line for line in server.stderr)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_it_points_at_is_there(page):
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http://", "https://")):
            file, _, heading = link.partition("#")
            there = (page.parent / file) if file else page
            assert there.exists(), link
            assert not heading or heading in headings(there), link
    for path in re.findall(r"`((?:src|modeling_tests|benchmarks|docs|examples)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def headings(page: Path) -> set[str]:
    """Of a page, as links name them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
