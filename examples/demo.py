"""
Asks the small model of this repository about a video file, in a process that has transformers but not this package.

`examples/linvt-shapes` is a complete Hub folder (`make shapes` trains it from nothing), and its `example.mp4` shows a
scene that no training saw.
"""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "linvt-shapes"
VIDEO = FOLDER / "example.mp4"
QUESTIONS = [
    {"question": "Which way does the yellow cross move?", "choices": ["left", "right", "up", "down"]},
    {"question": "What colour is the star at the end?", "choices": ["orange", "red", "yellow", "white"]},
    {"question": "What shape flashes up?", "choices": ["circle", "square", "triangle", "star", "ring", "cross"]},
]

ASK = """
import json
import sys
sys.modules["linvt_hf"] = None  # from here on importing the package fails: the folder must do alone
from transformers import pipeline

folder, video, questions = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
answer = pipeline("video-question-answering", model=folder, trust_remote_code=True)
for asked in questions:
    print("question:", asked["question"])
    print("answer:  ", answer(video=video, question=asked["question"], max_new_tokens=12)[0]["answer"])
    for choice in answer(video=video, **asked):
        print(f"          {choice['score']:6.1%}  {choice['answer']}")
"""


def main() -> None:
    print(f"model:    {FOLDER}, in a process without the package linvt_hf")
    print(f"video:    {VIDEO}", flush=True)
    subprocess.run([sys.executable, "-c", ASK, str(FOLDER), str(VIDEO), json.dumps(QUESTIONS)], check=True)


if __name__ == "__main__":
    main()
