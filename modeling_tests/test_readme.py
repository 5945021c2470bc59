"""The README's code runs as it stands, in order, beside what `make demo` leaves behind."""

import re
import runpy
import shlex
from pathlib import Path

from linvt_hf.cli import main

ROOT = Path(__file__).parent.parent


def test_every_block(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "demo.py"), run_name="__main__")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    ran = {"python": 0, "linvt": 0}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "README.md", "exec"), {})
            ran["python"] += 1
        elif language == "bash":
            for command in (shlex.split(line) for line in block.splitlines() if line.startswith("linvt ")):
                assert main(command[1:]) == 0, command
                ran["linvt"] += 1
    assert ran == {"python": 3, "linvt": 3}


def test_every_target_it_names():
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert {"demo", "test", "conformance"} <= set(named)
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
