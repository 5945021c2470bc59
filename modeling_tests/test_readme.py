"""The README's code runs as it stands, in order."""

import re
import shlex
from pathlib import Path

from tiny_bases import save_tiny_base

from linvt_hf.cli import main

ROOT = Path(__file__).parent.parent


def test_every_block(tmp_path, monkeypatch, capsys):
    """Where a Hub id stands, a tiny random model of the same architecture takes its place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    base = save_tiny_base("qwen2_vl", tmp_path / "image-llm")
    readme = (ROOT / "README.md").read_text().replace("Qwen/Qwen2-VL-2B-Instruct", str(base))
    ran = {"python": 0, "linvt": 0}
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(block, "README.md", "exec"), {})
            ran["python"] += 1
        elif language == "bash":
            for command in (shlex.split(line) for line in block.splitlines() if line.startswith("linvt ")):
                assert main(command[1:]) == 0, command
                ran["linvt"] += 1
    assert ran == {"python": 6, "linvt": 7}


def test_every_target_it_names():
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert {"demo", "test", "conformance"} <= set(named)
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
