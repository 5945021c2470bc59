"""
A wrapped image-LLM from frames to words: what each stage costs, and how it grows with the video.

    python benchmarks/end_to_end.py frames       # every frame's tokens, pooled, LinVT
    python benchmarks/end_to_end.py questions    # the first question about a video, and a further one
    python benchmarks/end_to_end.py batches      # several videos and questions at a time
    python benchmarks/end_to_end.py lengths      # long videos, encoded some frames at a time
    python benchmarks/end_to_end.py encoder      # the vision encoder, and ways to make it cheaper
    python benchmarks/end_to_end.py compiled     # the first and a further question, and words, after model.compile()
    python benchmarks/end_to_end.py frames --base qwen2_vl_7b --device cuda --dtype bfloat16 --json FILE

Real architectures with random weights, since time and memory do not depend on their values; frames are random pixels
that lie on the device, so that reading a video is not in it (`video_reading.py` measures that). Time to the first
token is that of `generate` with one new token. Memory is what a run takes beside weights and pixels.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import environment, save, show
from real_sizes import PATCHES, SIZES, WORDS, Bench, Film

WAYS = ("every frame", "pooled", "LinVT")


# ---- the tables: a row at a time ----


def frames(bench: Bench, counts: list[int], most: int) -> Iterator[dict]:
    """From pixels to the first token, and from there."""
    for count in counts:
        pixels = bench.frames(count)
        encoding = bench.seconds(lambda: bench.encode(pixels))  # noqa: B023
        features = torch.stack(bench.encode(pixels))
        asked = {"num_frames": [count], "frame_features": features, **bench.question()}
        asked |= {f"frames_{name}": value for name, value in pixels.items() if name != "pixel_values"}
        whole = None
        for way in WAYS:
            tokens = bench.use(way, count)
            row = {"frames": count, "way": way, "prompt": tokens + 2 * WORDS, "encoding s": encoding}
            if tokens <= most:
                inputs = {**bench.videos([count]), **bench.prompt(tokens)}
                try:
                    row |= _stages(bench, inputs, asked, tokens)
                    row["first token / encoding"] = row["first token s"] / encoding
                except torch.cuda.OutOfMemoryError:
                    row["first token s"] = "no room"
                    torch.cuda.empty_cache()
            first = row.get("first token s")
            whole = first if way == WAYS[0] else whole
            if isinstance(first, float) and isinstance(whole, float):
                row["times faster"] = whole / first
            yield row


def _stages(bench: Bench, inputs: dict, asked: dict, tokens: int) -> dict:
    row, first, more = {}, [], []
    row["condensing s"] = bench.seconds(lambda: bench.model.get_video_features(**asked))
    row["prefill s"] = bench.seconds(lambda: bench.prefill(tokens + 2 * WORDS))
    bench.answer(inputs, 2)  # warms up
    row["peak MB"] = bench.peak(lambda: first.append(bench.seconds(lambda: bench.answer(inputs), 0)))
    more.append(bench.seconds(lambda: bench.answer(inputs, 17), 0))
    return {**row, "first token s": first[0], "tokens/s": 16 / (more[0] - first[0])}


def questions(bench: Bench, counts: list[int], most: int) -> Iterator[dict]:
    """Of an encoded video only the second half of LinVT and the language model are run again."""
    bench.use("LinVT")
    for count in counts:
        prompt = {**bench.prompt(bench.video_tokens), **bench.question()}
        video = bench.model.encode_video(Film(bench, count))

        def first(count=count, prompt=prompt):
            return bench.answer({**prompt, "encoded_videos": [bench.model.encode_video(Film(bench, count))]})

        def further(video=video, prompt=prompt):
            return bench.answer({**prompt, "encoded_videos": [video]})

        row = {"frames": count, "first s": bench.seconds(first), "further s": bench.seconds(further)}
        yield {**row, "times faster": row["first s"] / row["further s"], "stored MB": video.nbytes / 2**20}


def encoder(bench: Bench, counts: list[int], most: int) -> Iterator[dict]:
    """Ways to make cheaper what is left: the encoder compiled, and frames of half the side where it takes any."""
    for count in counts:
        ways = {"as it is": bench.frames(count)}
        if bench.qwen:
            ways["half the side"] = bench.frames(count, PATCHES // 2)
        rows = {way: bench.seconds(lambda: bench.encode(pixels)) for way, pixels in ways.items()}  # noqa: B023
        with bench.compiled_encoder():
            for way, pixels in ways.items():
                rows[f"{way}, compiled"] = bench.seconds(lambda: bench.encode(pixels), warm_up=3)  # noqa: B023
        for way, taken in rows.items():
            yield {"frames": count, "way": way, "encoding s": taken, "times faster": rows["as it is"] / taken}


def compiled(bench: Bench, counts: list[int], most: int) -> Iterator[dict]:
    """A short prompt waits for kernels to be started, of which there are fewer after `model.compile()`."""
    bench.use("LinVT")
    for way in ("as it is", "compiled"):
        if way == "compiled":
            bench.model.compile()
        for count in counts:
            pixels, inputs = bench.frames(count), {**bench.videos([count]), **bench.prompt(bench.video_tokens)}
            prompt = {**bench.prompt(bench.video_tokens), **bench.question()}
            asked = {**prompt, "encoded_videos": [bench.model.encode_video(Film(bench, count))]}
            row = {"frames": count, "way": way}
            began = time.perf_counter()
            bench.answer(asked)
            bench.answer(inputs)
            row["first runs s"] = time.perf_counter() - began
            row["encoding s"] = bench.seconds(lambda: bench.encode(pixels))  # noqa: B023
            row["first token s"] = bench.seconds(lambda: bench.answer(inputs))  # noqa: B023
            row["further s"] = bench.seconds(lambda: bench.answer(asked))  # noqa: B023
            row["first token / encoding"] = row["first token s"] / row["encoding s"]
            row["times faster"] = row["first token s"] / row["further s"]
            yield row  # may be cut off before what comes next
            began = time.perf_counter()
            bench.answer(asked, 17)
            row["first words s"] = time.perf_counter() - began
            row["tokens/s"] = 16 / (bench.seconds(lambda: bench.answer(asked, 17)) - row["further s"])  # noqa: B023


def batches(bench: Bench, counts: list[int], most: int) -> Iterator[dict]:
    """So many videos of 24 to 40 frames, each with a question, and 32 new tokens for each."""
    bench.use("LinVT")
    for batch in (1, 2, 4, 8, 16):
        lengths = [32] if batch == 1 else [24 + 16 * number // (batch - 1) for number in range(batch)]
        inputs, taken = {**bench.videos(lengths), **bench.prompt(bench.video_tokens, batch)}, []
        peak = bench.peak(lambda: taken.append(bench.seconds(lambda: bench.answer(inputs, 32))))  # noqa: B023
        rate = batch / taken[0]
        yield {"videos": batch, "seconds": taken[0], "videos/s": rate, "tokens/s": 32 * rate, "peak MB": peak}


def lengths(bench: Bench, counts: list[int], most: int) -> Iterator[dict]:
    """Encoding and scoring, some frames at a time; at 1 frame a second, 7,200 frames are two hours."""
    bench.use("LinVT")
    bench.model.encode_video(Film(bench, bench.chunk))  # warms up
    for count in counts:
        video, taken = [], []

        def encoder_alone(count=count):
            for _, inputs in Film(bench, count).on(bench.device):
                bench.encode(inputs)

        def whole(count=count, video=video):
            video.clear()
            video.append(bench.model.encode_video(Film(bench, count)))

        row = {"frames": count, "encoder alone s": bench.seconds(encoder_alone, 0)}
        row["peak MB"] = bench.peak(lambda: taken.append(bench.seconds(whole, 0)))  # noqa: B023
        row["all s"], row["stored MB"] = taken[0], video[0].nbytes / 2**20
        row["beside it MB"] = row["peak MB"] - row["stored MB"]
        yield {**row, "all / alone": row["all s"] / row["encoder alone s"]}


TABLES = {
    "frames": (
        frames,
        [8, 32, 64, 128, 256, 1024],
        {
            "frames": "d",
            "way": "",
            "prompt": "d",
            "encoding s": ".3f",
            "condensing s": ".4f",
            "prefill s": ".3f",
            "first token s": ".3f",
            "first token / encoding": ".2f",
            "times faster": ".1f",
            "tokens/s": ".1f",
            "peak MB": ".0f",
        },
    ),
    "questions": (
        questions,
        [64, 256, 1024],
        {"frames": "d", "first s": ".3f", "further s": ".4f", "times faster": ".1f", "stored MB": ".0f"},
    ),
    "encoder": (
        encoder,
        [64, 256],
        {"frames": "d", "way": "", "encoding s": ".3f", "times faster": ".2f"},
    ),
    "compiled": (
        compiled,
        [64, 256],
        {
            "frames": "d",
            "way": "",
            "encoding s": ".3f",
            "first token s": ".3f",
            "first token / encoding": ".2f",
            "further s": ".4f",
            "times faster": ".1f",
            "tokens/s": ".1f",
            "first runs s": ".0f",
            "first words s": ".0f",
        },
    ),
    "batches": (
        batches,
        [],
        {"videos": "d", "seconds": ".2f", "videos/s": ".2f", "tokens/s": ".1f", "peak MB": ".0f"},
    ),
    "lengths": (
        lengths,
        [64, 256, 1024, 2048, 7200],
        {
            "frames": "d",
            "encoder alone s": ".2f",
            "all s": ".2f",
            "all / alone": ".2f",
            "peak MB": ".0f",
            "stored MB": ".0f",
            "beside it MB": ".0f",
        },
    ),
}


def exponents(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Of each stage and way, n in `time ~ frames ** n`, fitted to the logarithms of the rows of 32 frames and more."""
    found: dict[str, dict[str, float]] = {}
    for way in dict.fromkeys(row.get("way", "all") for row in rows):
        of_way = [row for row in rows if row.get("way", "all") == way and row["frames"] >= 32]
        for stage in [name for name in (of_way or [{}])[0] if name.endswith(" s")]:
            points = [(math.log(r["frames"]), math.log(r[stage])) for r in of_way if isinstance(r.get(stage), float)]
            if len(points) > 1:
                x, y = (torch.tensor(values) for values in zip(*points, strict=True))
                x = x - x.mean()
                found.setdefault(way, {})[stage.removesuffix(" s")] = round(float((x * y).sum() / (x * x).sum()), 2)
    return found


def profile(bench: Bench, count: int) -> str:
    """What takes the time from pixels to the first token."""
    bench.use("LinVT")
    inputs = {**bench.videos([count]), **bench.prompt(bench.video_tokens)}
    bench.answer(inputs)
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = torch.device(bench.device).type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as run:
        bench.answer(inputs)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return run.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("tables", nargs="+", choices=[*TABLES, "profile"])
    parser.add_argument("--base", choices=SIZES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--frames", type=int, nargs="+", help="instead of a table's own")
    parser.add_argument("--lengths", type=int, nargs="+", help="the same for the table of lengths")
    parser.add_argument("--most-tokens", type=int, default=70_000, help="longer prompts are not tried")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    bench = Bench(args.base, args.device, getattr(torch, args.dtype), args.repeats)
    result = {"base": args.base, "dtype": args.dtype, **environment(args.device), "tables": {}}
    for name in args.tables:
        print(f"\n{name}: {args.base}, {args.dtype}, {result['device']}", flush=True)
        if name == "profile":
            print(profile(bench, (args.frames or [64])[0]))
            continue
        measure, counts, columns = TABLES[name]
        rows = []
        with torch.no_grad():
            own = args.lengths if name == "lengths" else args.frames
            for row in measure(bench, own or counts, args.most_tokens):
                rows.append(row)
                result["tables"][name] = {"rows": rows}
                save(args.json, result)  # a long run may be cut off
        show(rows, columns)
        if name in ("frames", "lengths"):
            result["tables"][name]["exponents"] = exponents(rows)
            print(f"grow with the frames to the power of {result['tables'][name]['exponents']}")
        save(args.json, result)


if __name__ == "__main__":
    main()
