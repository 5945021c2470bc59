"""
Time, memory and size of the Linear Video Tokenizer against the number of frames.

    python benchmarks/tokenizer.py [--device cuda] [--dtype bfloat16] [--frames 8 16 32 64] [--json results.json]

Random tokens at the real shapes (by default D = 3584 and N = 256, those of a 7B model): time and memory do not depend
on their values. Every number says which device, versions and commit it comes from.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
import transformers

from linvt_hf import LinearVideoTokenizer, LinVTConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--tokens-per-frame", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=3584)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    tokenizer = LinearVideoTokenizer(LinVTConfig(hidden_size=args.hidden_size)).to(args.device, dtype).eval()
    question = torch.randn(1, 16, args.hidden_size, device=args.device, dtype=dtype)
    rows = [measure(tokenizer, frames, question, args) for frames in args.frames]
    result = {
        "parameters_millions": round(sum(p.numel() for p in tokenizer.parameters()) / 1e6, 2),
        "video_tokens": tokenizer.config.num_video_tokens,
        "hidden_size": args.hidden_size,
        "tokens_per_frame": args.tokens_per_frame,
        "dtype": args.dtype,
        "rows": rows,
        **environment(args.device),
    }
    print(f"{result['parameters_millions']} M parameters, {result['device']}, {args.dtype}, commit {result['commit']}")
    print("frames  tokens in  tokens out  median ms  peak MB beside the input")
    for row in rows:
        peak = "-" if row["peak_megabytes"] is None else f"{row['peak_megabytes']:.0f}"
        tokens = row["frames"] * args.tokens_per_frame
        print(f"{row['frames']:6d} {tokens:10d} {result['video_tokens']:11d} {row['median_ms']:10.1f}  {peak}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


@torch.no_grad()
def measure(tokenizer: LinearVideoTokenizer, frames: int, question: torch.Tensor, args) -> dict:
    tokens = torch.randn(1, frames, args.tokens_per_frame, args.hidden_size, device=args.device, dtype=question.dtype)
    on_gpu = torch.device(args.device).type == "cuda"
    times, peak = [], None
    for _ in range(args.repeats + 1):  # the first one warms up
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        tokenizer(tokens, text_embeds=question)
        if on_gpu:
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        times.append(1000 * (time.perf_counter() - start))
    return {"frames": frames, "median_ms": statistics.median(times[1:]), "peak_megabytes": peak}


def environment(device: str) -> dict:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or None,
    }


if __name__ == "__main__":
    main()
