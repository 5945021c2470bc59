"""
Frames to pixels: ours in torch beside each base's own image processor, which goes through PIL where torchvision is
not installed.

    python benchmarks/frames_to_pixels.py [--frames 64] [--size 720 1280] [--repeats 5] [--threads 2] [--device cuda]

The image processors have the settings of the published checkpoints. Both ways start at the frames as they were
decoded, uint8 [T, H, W, 3] on the CPU, and take turns; the numbers are medians. Image processors that use torchvision,
where it is installed, get the frames as tensors on the device; those that use PIL get pictures.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from measuring import environment, save, wait
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

from linvt_hf.frames_to_pixels import frames_to_pixels
from linvt_hf.image_llm import BASES

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"height": 384, "width": 384}
QWEN = {"size": {"shortest_edge": 128 * 784, "longest_edge": 768 * 784}}
PUBLISHED = {
    "blip3": ("Blip3ImageProcessor", {}, BASES["blip3"].frame_kwargs),
    "molmo": ("MolmoImageProcessor", {}, BASES["molmo_v1"].frame_kwargs),
    "mipha": ("LlavaImageProcessor", {**HALF, "size": SQUARE, "do_center_crop": False, "do_pad": True}, {}),
    "internvl2": ("GotOcr2ImageProcessor", {"size": {"height": 448, "width": 448}}, BASES["internvl"].frame_kwargs),
    "qwen2_vl": ("Qwen2VLImageProcessor", {}, QWEN),
    "aquila": ("LlavaOnevisionImageProcessor", {**HALF, "size": SQUARE, "image_grid_pinpoints": [[384, 384]]}, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--size", type=int, nargs=2, default=[720, 1280], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    coarse = torch.rand(args.frames, 3, 9, 16)
    smooth = torch.nn.functional.interpolate(coarse, args.size, mode="bicubic").clamp(0, 1)
    frames = (255 * smooth).byte().permute(0, 2, 3, 1).contiguous()
    rows = []
    made_with = environment(args.device)
    print(f"{args.frames} frames of {args.size[0]} x {args.size[1]}, {made_with}")
    print("base        their own s   ours s   ratio")
    for name, (kind, settings, frame_kwargs) in PUBLISHED.items():
        image_processor = get_image_processor_class_from_name(kind)(**settings)
        times: dict[str, list[float]] = {"theirs": [], "ours": []}
        for _ in range(args.repeats):
            began = time.perf_counter()
            if isinstance(image_processor, TorchvisionBackend):
                pictures = [[frame] for frame in frames.to(args.device).permute(0, 3, 1, 2)]
            else:
                pictures = [[Image.fromarray(frame)] for frame in frames.numpy()]
            image_processor(pictures, return_tensors="pt", **frame_kwargs)
            wait(args.device)
            times["theirs"].append(time.perf_counter() - began)
            began = time.perf_counter()
            frames_to_pixels(frames.to(args.device), image_processor, frame_kwargs)
            wait(args.device)
            times["ours"].append(time.perf_counter() - began)
        theirs, ours = (statistics.median(times[way]) for way in ("theirs", "ours"))
        way = "torchvision" if isinstance(image_processor, TorchvisionBackend) else "PIL"
        rows.append({"base": name, "their way": way, "theirs": theirs, "ours": ours})
        print(f"{name:10} {theirs:12.3f} {ours:8.3f} {theirs / ours:7.1f}  {way}", flush=True)
    save(args.json, {**made_with, "frames": args.frames, "size": args.size, "rows": rows})


if __name__ == "__main__":
    main()
