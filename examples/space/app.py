"""
A page to ask a LinVT model about a video, and to see which moments and places each answer was read from.

    make space                                   # the small model that comes with the repository, on the CPU
    LINVT_MODEL=someone/model python app.py      # another, a Hub id or a folder

As a Hub Space it needs the package and a model beside it; `make space-folder` puts them together.
"""

import functools
import hashlib
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import matplotlib

matplotlib.use("Agg")  # there is no screen

from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402

from linvt_hf.asking.loading import load_pipeline  # noqa: E402
from linvt_hf.explain.pictures import Pictures, seen_box  # noqa: E402
from linvt_hf.serving.engine import Engine  # noqa: E402
from linvt_hf.serving.questions import Busy, Piece, Question  # noqa: E402
from linvt_hf.video_limits import Limits  # noqa: E402
from linvt_hf.video_reading import video_info  # noqa: E402

HERE = Path(__file__).resolve().parent
FOLDERS = [folder / "linvt-shapes" for folder in (HERE, HERE.parent)]  # as a Space, and in the repository
MODEL = os.environ.get("LINVT_MODEL") or str(FOLDERS[0] if FOLDERS[0].exists() else FOLDERS[1])
# What a visitor may ask for; all ours.
MAX_MEGABYTES = int(os.environ.get("LINVT_MAX_MEGABYTES", "100"))
MAX_SECONDS = int(os.environ.get("LINVT_MAX_SECONDS", "1800"))
MAX_FRAMES = int(os.environ.get("LINVT_MAX_FRAMES", "64"))
MAX_NEW_TOKENS, ANSWER_SECONDS, WAITING = 256, 120, 32
LIMITS = Limits(frames=MAX_FRAMES, seconds=60)

_drawing = threading.Lock()  # pyplot is one for all threads


class Page:
    """What the page does, for all its visitors: one engine, which remembers the videos that they ask about."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def answer(self, video: str | None, words: str, frames: int, history: list[dict]) -> Iterator[tuple]:
        """The chat with the answer so far, then the timeline and the heat map."""
        if not video:
            raise refusal("Give a video first.")
        if not words.strip():
            raise refusal("Ask something about the video.")
        block = {"type": "video", "video": video, "key": check(video)}
        question = Question(
            [{"role": "user", "content": [block, {"type": "text", "text": words}]}],
            num_frames=frames,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=0.0,
            seconds=ANSWER_SECONDS,
            limits=LIMITS,
        )
        before, history, said = history, [*history, {"role": "user", "content": words}], ""
        yield [*history, {"role": "assistant", "content": "..."}], None, None
        try:
            for event in self.engine.stream(question):
                said += event.text if isinstance(event, Piece) else ""
                yield [*history, {"role": "assistant", "content": said or "(nothing)"}], None, None
            history = [*history, {"role": "assistant", "content": said or "(nothing)"}]
            yield history, *(self.pictures(video, question, words, said) if said else (None, None))
        except (ValueError, OSError, Busy) as error:
            yield before, None, None  # no question without an answer stays
            raise refusal(str(error).replace(repr(video), "The video")) from error

    def pictures(self, video: str, question: Question, words: str, said: str) -> tuple[Image.Image, Image.Image]:
        """Where the answer was read from: the timeline, and the heaviest frames."""

        def explain(pipeline):
            (encoded,) = self.engine.videos(question)
            return pipeline.explain(encoded, words, answer=said, importance="gradient")

        explanation = self.engine.run(explain).result()
        processor = self.engine.pipeline.processor
        clip = processor._read(video, num_frames=question.num_frames, limits=LIMITS)
        with _drawing:
            drawn = Pictures(explanation, clip, seen_box(processor, *clip.frames.shape[1:3]))
            return picture(drawn.timeline()), picture(drawn.heat_maps(min(6, clip.num_frames)))


@functools.lru_cache(maxsize=256)
def check(video: str) -> str:
    """What tells the video from others. Raises `gr.Error` for one that is too large, too long or broken."""
    try:
        megabytes, info = Path(video).stat().st_size / 2**20, video_info(video, limits=LIMITS)
    except (ValueError, OSError) as error:
        raise refusal(str(error).replace(repr(video), "The video")) from error
    if megabytes > MAX_MEGABYTES:
        raise refusal(f"The video has {megabytes:.1f} MB, and {MAX_MEGABYTES} are the most here.")
    if info.duration is not None and info.duration > MAX_SECONDS:
        lasts, most = duration(info.duration), duration(MAX_SECONDS)
        raise refusal(f"The video lasts {lasts}, and {most} are the most here.")
    return hashlib.sha256(Path(video).read_bytes()).hexdigest()


def refusal(sentence: str) -> gr.Error:
    """What a visitor is told; the log is for what is our fault."""
    return gr.Error(" ".join(sentence.split()), title="This cannot be answered", print_exception=False)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def picture(figure: Figure) -> Image.Image:
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    pyplot.close(figure)
    return Image.open(content)


def example_of(model: str) -> str | None:
    """A video that comes with the model."""
    file = Path(model) / "example.mp4"
    return str(file) if file.exists() else None


def build(page: Page, model: str) -> gr.Blocks:
    default = min(page.engine.pipeline.processor.num_frames or 32, MAX_FRAMES)
    example = example_of(model)
    with gr.Blocks(title="LinVT: ask about a video", delete_cache=(600, 3600)) as blocks:
        gr.Markdown(
            "# Ask about a video\n"
            f"**{Path(model).name}** reads a video as a few tokens, each a weighted mean of what its frames show. "
            "Those weights tell which moments and places an answer was read from."
        )
        with gr.Row():
            with gr.Column():
                video = gr.Video(
                    sources=["upload"], label=f"Video, at most {duration(MAX_SECONDS)} and {MAX_MEGABYTES} MB"
                )
                frames = gr.Slider(1, MAX_FRAMES, default, step=1, label="Frames to read of it")
                if example:
                    gr.Examples([[example]], [video], label="Or take this one")
            with gr.Column():
                chat = gr.Chatbot(label="Answers", height=360)
                words = gr.Textbox(label="Question", placeholder="What shape flashes up?", autofocus=True)
                ask = gr.Button("Ask", variant="primary")
        timeline = gr.Image(label="When: how much each moment weighs in the answer", elem_id="timeline")
        heat = gr.Image(label="Where: the heaviest frames, and the places in them", elem_id="heat")
        for asked in (ask.click, words.submit):
            asked(page.answer, [video, words, frames, chat], [chat, timeline, heat], concurrency_limit=8)
        video.change(lambda: ([], None, None), None, [chat, timeline, heat], queue=False)
    return blocks.queue(max_size=WAITING)


def main() -> None:
    engine = Engine(load_pipeline(MODEL), max_waiting=WAITING)
    allowed = [example] if (example := example_of(MODEL)) else []
    build(Page(engine), MODEL).launch(max_file_size=f"{MAX_MEGABYTES}mb", allowed_paths=allowed, show_error=True)


if __name__ == "__main__":
    main()
