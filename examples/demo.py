"""
From a video file to an answer: writes a short mp4, makes a Hub folder of a LinVT model, and asks the model about the
video in a process that has transformers but not this package.

Its image-LLM is a tiny Qwen2-VL with random weights, so the answer is nonsense: this shows the way, not the quality.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "modeling_tests"))  # the tests' tiny image-LLM and video writer

from tiny_bases import TINY_LINVT, save_tiny_base  # noqa: E402
from video_files import moving_square, write_video  # noqa: E402

from linvt_hf import wrap  # noqa: E402

ASK = """
import sys
sys.modules["linvt_hf"] = None  # from here on importing the package fails: the folder must do alone
from transformers import pipeline

folder, video = sys.argv[1:]
answer = pipeline("video-question-answering", model=folder, trust_remote_code=True)
question = "Which way does the square move?"
print("question:", question)
print("answer:  ", repr(answer(video=video, question=question, max_new_tokens=12)[0]["answer"]))
for choice in answer(video=video, question=question, choices=["to the left", "to the right"]):
    print(f"          {choice['score']:6.1%}  {choice['answer']}")
"""


def main(out: Path) -> None:
    folder, video = out / "model", out / "video.mp4"
    out.mkdir(parents=True, exist_ok=True)
    write_video(video, moving_square(48, height=120, width=160), fps=12)
    print(f"video:    {video}, 4 seconds of a moving square")

    base = save_tiny_base("qwen2_vl", out / "image-llm")
    model, processor = wrap(base, num_frames=16, **TINY_LINVT)
    model.save_pretrained(folder, processor=processor)
    print(f"model:    {folder}, a complete Hub folder (weights, code, processor, card)")

    print("asking it in a process without the package linvt_hf ...", flush=True)
    subprocess.run([sys.executable, "-c", ASK, str(folder), str(video)], check=True)
    print("The weights are random, so this answer means nothing yet; what worked is the way to it.")


if __name__ == "__main__":
    main(Path("build") / "demo")
