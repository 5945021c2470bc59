"""
The Linear Video Tokenizer alone: time, memory and size against the frames it condenses, beside the layout of the
authors' code and beside what the machine's own speed allows.

    python benchmarks/tokenizer.py [--device cuda --dtype bfloat16] [--frames 8 16 32 64] [--json results.json]

Random tokens at real shapes (by default D = 3584 and N = 256, those of a 7B model): time and memory do not depend on
their values. The two floors are the operations and the bytes that no way around leads past, at the speeds that a
matrix product and a copy reach on this machine: each token of V read once, each weight read once, each layer's
features written once. "As one graph" is LinVT's own kernels, on a GPU, started all at once (a CUDA graph).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import environment, peak_megabytes, save, seconds, show
from torch import Tensor, nn

from linvt_hf import LinearVideoTokenizer, LinVTConfig

COLUMNS = {
    "frames": "d",
    "LinVT ms": ".1f",
    "compiled ms": ".1f",
    "as one graph ms": ".1f",
    "arithmetic floor ms": ".2f",
    "memory floor ms": ".2f",
    "MB beside V": ".0f",
    "authors' layout ms": ".0f",
    "MB beside V there": ".0f",
}


class AuthorsLayout(nn.Module):
    """
    The layout of the authors' code, plainly: everything at the width D of the language model. 8 layers of attention
    inside frames and across them score; 8 layers of queries read themselves, the kept tokens and the question.
    """

    LAYERS, HEADS, KEPT, QUERIES = 8, 4, 1024, 64

    def __init__(self, size: int):
        super().__init__()
        self.score = nn.Linear(size, 1)
        self.queries = nn.Parameter(torch.randn(self.QUERIES, size))
        self.refine = nn.ModuleList(
            nn.ModuleList(nn.MultiheadAttention(size, self.HEADS, batch_first=True) for _ in range(2))
            for _ in range(self.LAYERS)
        )
        self.aggregate = nn.ModuleList(
            nn.ModuleList(nn.MultiheadAttention(size, self.HEADS, batch_first=True) for _ in range(3))
            for _ in range(self.LAYERS)
        )
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:  # [T, N, D], [1, L, D] -> [1, M, D]
        for inside, across in self.refine:
            y = self.norm(x)
            x = x + inside(y, y, y, need_weights=False)[0]
            y = self.norm(x).transpose(0, 1)
            x = x + across(y, y, y, need_weights=False)[0].transpose(0, 1)
        tokens = x.flatten(0, 1)
        chosen = self.score(tokens)[:, 0].topk(min(self.KEPT, len(tokens))).indices
        kept = tokens[None, chosen]
        scales = [nn.functional.avg_pool1d(kept.transpose(1, 2), s).transpose(1, 2) for s in (1, 2, 4)]
        kept, queries = torch.cat(scales, dim=1), self.queries[None]
        for own, visual, words in self.aggregate:
            for attention, context in ((own, None), (visual, kept), (words, text)):
                y = self.norm(queries)
                context = y if context is None else context
                queries = queries + attention(y, context, context, need_weights=False)[0]
        return queries


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--tokens-per-frame", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=3584)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--authors-most", type=int, default=64, help="the most frames for the authors' layout")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    kind = {"device": args.device, "dtype": getattr(torch, args.dtype)}

    tokenizer = LinearVideoTokenizer(LinVTConfig(hidden_size=args.hidden_size)).to(**kind).eval()
    compiled = None if args.no_compile else torch.compile(tokenizer, dynamic=True, fullgraph=True)
    with torch.device(args.device):
        theirs = AuthorsLayout(args.hidden_size).to(kind["dtype"]).eval() if args.authors_most else None
    question = torch.randn(1, 16, args.hidden_size, **kind)
    speed, bandwidth = machine_speed(**kind)
    rows = []
    for frames in args.frames:
        tokens = torch.randn(1, frames, args.tokens_per_frame, args.hidden_size, **kind)

        def ours(model=tokenizer, tokens=tokens):
            return model(tokens, text_embeds=question)

        def authors(tokens=tokens):
            return theirs(tokens[0], question)

        operations, moved = least_work(tokenizer, frames, args.tokens_per_frame, tokens.element_size())
        row = {
            "frames": frames,
            "LinVT ms": 1000 * seconds(ours, args.device, args.repeats),
            "arithmetic floor ms": 1000 * operations / speed,
            "memory floor ms": 1000 * moved / bandwidth,
            "MB beside V": peak_megabytes(ours, args.device),
        }
        if torch.device(args.device).type == "cuda":
            row["as one graph ms"] = 1000 * seconds(one_graph(ours), args.device, args.repeats)
        if compiled is not None:
            row["compiled ms"] = 1000 * seconds(lambda: ours(compiled), args.device, args.repeats, warm_up=3)  # noqa: B023
        if frames <= args.authors_most:
            row["authors' layout ms"] = 1000 * seconds(authors, args.device, args.repeats)
            row["MB beside V there"] = peak_megabytes(authors, args.device)
        rows.append(row)
    result = {
        "LinVT's parameters": sum(p.numel() for p in tokenizer.parameters()),
        "parameters of the authors' layout": theirs and sum(p.numel() for p in theirs.parameters()),
        "video tokens": tokenizer.config.num_video_tokens,
        "hidden size": args.hidden_size,
        "tokens per frame": args.tokens_per_frame,
        "dtype": args.dtype,
        "TFLOP/s of a matrix product": speed / 1e12,
        "GB/s of a copy": bandwidth / 1e9,
        "rows": rows,
        **environment(args.device),
    }
    print(", ".join(f"{name}: {value}" for name, value in result.items() if name != "rows"))
    show(rows, COLUMNS)
    save(args.json, result)


def one_graph(work: Callable[[], object]) -> Callable[[], None]:
    """All of its kernels as one CUDA graph, of inputs that stay where they are."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):  # what libraries do at their first call cannot be part of a graph
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def least_work(tokenizer: LinearVideoTokenizer, frames: int, places: int, size: int) -> tuple[float, float]:
    """Operations and bytes that it takes at least; see the top. The question and the queries are next to nothing."""
    config = tokenizer.config
    count, width, bottleneck = frames * places, config.hidden_size, config.bottleneck_size
    layer = 8 * bottleneck**2 + 2 * config.mlp_ratio * bottleneck**2  # multiplications a token: linear maps,
    layer += 2 * bottleneck * (places + frames)  # and both attentions
    each = width * bottleneck + config.num_scoring_layers * layer + 2 * bottleneck**2
    weights = sum(p.numel() for p in tokenizer.parameters())
    features = 2 * bottleneck * (1 + 3 * config.num_scoring_layers)  # written and read
    return 2.0 * count * each, float(size * (count * (width + features) + weights))


def machine_speed(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a large matrix product, and bytes a second of a large copy, read and written."""
    side = 8192 if torch.device(device).type == "cuda" else 2048
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = seconds(lambda: one @ other, device, 10, 3)
    large = torch.randn(2**28 if side == 8192 else 2**25, device=device)
    copy = torch.empty_like(large)
    copying = seconds(lambda: copy.copy_(large), device, 10, 3)
    return 2.0 * side**3 / product, 2.0 * large.nbytes / copying


if __name__ == "__main__":
    main()
