"""The method itself: what LinearVideoTokenizer promises of its weights, its selection, its start and its training."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from linvt_hf import video_tokenizer
from linvt_hf.configuration_linvt import LinVTConfig
from linvt_hf.running_tokens import RunningTokens, best_of_each
from linvt_hf.token_refiner import (
    Candidates,
    Dropped,
    PoolingWindows,
    Remainder,
    VideoTokens,
    number_tokens,
    select_top_k,
)
from linvt_hf.token_scorer import change_of, novelty, windows_of
from linvt_hf.tokenizer_parts import PlaceEmbedding
from linvt_hf.video_tokenizer import LinearVideoTokenizer, normalise_times

WIDTH = 64  # D, more than the T * N of most videos here: then the weights can be read back from the output
TOY = {
    "hidden_size": WIDTH,
    "bottleneck_size": 16,
    "num_heads": 2,
    "num_scoring_layers": 1,
    "num_aggregation_layers": 1,
    "num_selected_tokens": 10,
    "queries_per_scale": (4, 2, 2),
    # On, so that whatever is promised holds with them; off is tested by name.
    "num_remainder_tokens": 4,
    "novelty_gain": 4.0,
}
# The selection as the paper has it, from scores alone, and what is not selected is gone.
PLAIN = {"num_remainder_tokens": 0, "novelty_gain": 0.0}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """At toy sizes threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fresh(**settings) -> LinearVideoTokenizer:
    torch.manual_seed(0)
    return LinearVideoTokenizer(LinVTConfig(**{**TOY, **settings})).eval()


def trained(**settings) -> LinearVideoTokenizer:
    """Far from initialisation, so that content, scores and question all move the weights."""
    model = fresh(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Cells stay wide enough for every token to count.
            parameter.add_(torch.randn_like(parameter) * (0.05 if name.endswith(("centers", "log_widths")) else 0.3))
        model.aggregator.log_widths.add_(0.5)
    return model


def video(batch=1, frames=3, places=4, seed=1) -> torch.Tensor:
    return torch.randn(batch, frames, places, WIDTH, generator=torch.Generator().manual_seed(seed))


def question(batch=1, words=5, seed=2) -> torch.Tensor:
    return torch.randn(batch, words, WIDTH, generator=torch.Generator().manual_seed(seed))


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, output_weights=True, **kwargs)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def top_k(scores, frame_mask, k):
    """Of scores [B, T, N]."""
    index, mask = number_tokens(frame_mask, scores.shape, scores.device)
    return select_top_k(scores.flatten(1), index, scores.shape[2], mask, k)


def news_of(tokens, frame_mask):
    """Of tokens [B, T, N, D]."""
    change = change_of(tokens, frame_mask)
    return novelty(change.flatten(1), change.amax(dim=(1, 2))).view_as(change)


def remainder(scores, index, kept, count):
    """Of scores [B, T, N], of evenly spaced frames."""
    tokens = fresh().refine(torch.ones(*scores.shape, WIDTH))
    return Remainder(scores.flatten(1), tokens, index, kept, count)


def differs(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


# ---- every output token is a convex combination of V's own tokens ----


@pytest.mark.parametrize("make", [fresh, trained])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("frames, places, k", [(3, 4, 10), (2, 3, 10), (5, 7, 10), (5, 7, 35), (1, 1, 10)])
def test_output_is_convex_combination(make, plain, frames, places, k):
    tokens = video(2, frames, places)
    out = run(make(num_selected_tokens=k, **(PLAIN if plain else {})), tokens, text_embeds=question(2))
    assert out.weights.shape == (2, 8, frames * places)
    assert out.video_tokens.shape == (2, 8, WIDTH)
    assert out.scores.shape == (2, frames, places)
    close(out.video_tokens, out.weights @ tokens.flatten(1, 2))
    close(out.weights.sum(-1), torch.ones(2, 8))
    assert (out.weights >= 0).all()
    used = (out.weights > 0).sum(-1)
    assert (used <= k).all() if plain else (used == frames * places).all()


def test_output_lies_in_span_and_weights_can_be_read_back():
    tokens = video().flatten(1, 2)[0].double()  # 12 tokens, 64 dimensions: linearly independent
    out = run(trained(), video())
    result = out.video_tokens[0].double()
    recovered = result @ torch.linalg.pinv(tokens)
    outside = result - recovered @ tokens
    assert outside.norm() / result.norm() < 1e-5
    # One set of weights a token, the same for every channel: the only ones that explain the output are those returned.
    close(recovered.float(), out.weights[0], 1e-4)


def test_weights_for_each_channel_are_the_same():
    out = run(trained(), video())
    for channels in (slice(0, 20), slice(20, 40), slice(40, 64)):  # each slice alone determines the 12 weights
        part = video().flatten(1, 2)[0][:, channels].double()
        recovered = out.video_tokens[0][:, channels].double() @ torch.linalg.pinv(part)
        close(recovered.float(), out.weights[0], 1e-4)


def test_asking_for_weights_changes_nothing():
    model = trained()
    with torch.no_grad():
        plain = model(video())
    assert plain.weights is None
    assert torch.equal(plain.video_tokens, run(model, video()).video_tokens)


def test_weights_do_not_depend_on_the_scale_of_the_tokens():
    model, tokens = trained(), video()
    out = run(model, tokens)
    for factor in (1e-2, 300.0):
        scaled = run(model, factor * tokens)
        close(scaled.weights, out.weights)
        close(scaled.video_tokens / factor, out.video_tokens, 1e-4)


def test_negated_and_shifted_tokens_obey_their_own_weights():
    model, tokens = trained(), video()
    out = run(model, tokens)
    for changed in (-tokens, tokens + 3, tokens * torch.linspace(-2, 2, WIDTH)):
        other = run(model, changed)
        close(other.video_tokens, other.weights @ changed.flatten(1, 2))
        assert differs(other.weights, out.weights) > 1e-3  # the weights do look at the content


# ---- samples and padding ----


def test_samples_do_not_leak():
    model = trained()
    tokens, words = video(3).requires_grad_(), question(3).requires_grad_()
    out = model(tokens, text_embeds=words)
    out.video_tokens[1].square().sum().backward()
    for x in (tokens, words):
        assert (x.grad[1] != 0).any()
        assert (x.grad[[0, 2]] == 0).all()
    with torch.no_grad():
        alone = model(tokens[1:2], text_embeds=words[1:2])
    close(alone.video_tokens, out.video_tokens[1:2].detach())


@pytest.mark.parametrize("make", [fresh, trained])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "frames, places",
    [
        (2, 3),  # below k, and no multiple of the pooling kernels
        (1, 1),
        (2, 5),  # just k
        (3, 4),
        (5, 7),
    ],
)
def test_a_video_alone_is_the_video_in_a_batch(make, side, frames, places):
    model, longest = make(), 6
    short, other = video(1, frames, places), video(1, longest, places, seed=3)
    times = torch.arange(longest).float().square()
    padding = 50 * video(1, longest - frames, places, seed=4)  # padding may hold anything finite
    parts = (short, padding) if side == "right" else (padding, short)
    real = slice(0, frames) if side == "right" else slice(longest - frames, longest)
    mask = torch.ones(2, longest, dtype=torch.long)
    mask[1] = 0
    mask[1, real] = 1
    batch_times = torch.stack([times, torch.full_like(times, 77.0)])
    batch_times[1, real] = times[:frames]
    words = question(2)
    for frame_times in (None, batch_times):
        batch = run(
            model,
            torch.cat([other, torch.cat(parts, dim=1)]),
            frame_mask=mask,
            frame_times=frame_times,
            text_embeds=words,
        )
        alone_times = None if frame_times is None else times[None, :frames]
        alone = run(model, short, frame_times=alone_times, text_embeds=words[1:])
        close(batch.video_tokens[1:], alone.video_tokens)
        weights = batch.weights[1].view(8, longest, places)
        close(weights[:, real].flatten(1), alone.weights[0])
        assert (weights[:, mask[1] == 0] == 0).all()  # exactly, not nearly
        close(batch.weights.sum(-1), torch.ones(2, 8))
        close(batch.scores[1:, real], alone.scores)
        # And the full-length video beside it needs no mask.
        full_times = None if frame_times is None else times[None]
        close(batch.video_tokens[:1], run(model, other, frame_times=full_times, text_embeds=words[:1]).video_tokens)


def test_mask_of_ones_is_no_mask():
    model, tokens = trained(), video(2)
    close(run(model, tokens, frame_mask=torch.ones(2, 3)).weights, run(model, tokens).weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_padding_of_zeros_is_harmless_in_every_dtype(dtype):
    # Batches are padded with zeros, whose norm is 0 and must not be divided by.
    tokens = video(2).to(dtype)
    tokens[1, 2] = 0
    out = run(fresh().to(dtype), tokens, frame_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert out.video_tokens.isfinite().all()
    assert out.scores.isfinite().all()


# ---- the question ----


@pytest.mark.parametrize("side", ["left", "right"])
def test_question_padding_is_harmless(side):
    model, words = trained(), question(1, 5)
    padding = 20 * question(1, 3, seed=9)
    parts, mask = ((words, padding), [1] * 5 + [0] * 3) if side == "right" else ((padding, words), [0] * 3 + [1] * 5)
    padded = run(model, video(), text_embeds=torch.cat(parts, dim=1), text_mask=torch.tensor([mask]))
    close(padded.weights, run(model, video(), text_embeds=words).weights)


def test_question_matters():
    model = trained()
    asked = run(model, video(), text_embeds=question()).weights
    assert differs(run(model, video(), text_embeds=question(seed=5)).weights, asked) > 1e-3
    assert differs(run(model, video(), text_embeds=question().flip(1)).weights, asked) > 1e-4  # word order
    assert differs(run(model, video()).weights, asked) > 1e-3


def test_scores_read_the_question_where_they_may():
    for settings in ({}, {"text_in_scores": False}):
        model = trained(**settings)
        one, other = (run(model, video(), text_embeds=question(seed=seed)).scores for seed in (5, 6))
        assert torch.equal(one, other) == bool(settings)


def test_question_is_not_read_without_text_conditioning():
    model = trained(text_conditioning=False)
    assert torch.equal(
        run(model, video(), text_embeds=question()).video_tokens, run(model, video()).video_tokens
    )  # bit for bit


def test_no_question_equals_masked_question():
    model, tokens = trained(), video(2)
    none = run(model, tokens).weights
    close(run(model, tokens, text_embeds=question(2), text_mask=torch.zeros(2, 5)).weights, none)
    close(run(model, tokens, text_embeds=question(2, 0)).weights, none)
    # Also beside a sample that has one.
    mask = torch.tensor([[1] * 5, [0] * 5])
    mixed = run(model, tokens, text_embeds=question(2), text_mask=mask).weights
    close(mixed[1], none[1])
    assert differs(mixed[0], none[0]) > 1e-3


# ---- training ----

TEXT_ONLY = ("question.project.", "question.norm.", "question.embed_order.")
ONE_KEY = ("text_norm.", "text_attention.query.", "text_attention.key.")  # with one key there is nothing to choose


def gradients(model, **inputs) -> dict[str, float]:
    """Size of each parameter's gradient; what a softmax cancels by construction is left out."""
    model.train()
    tokens = video(2, 5, 7)
    target = video(1, 1, 16, seed=8)[0, 0].repeat(2, 1, 1)[:, :8]
    out = model(tokens, **inputs)
    (out.video_tokens * target).sum().backward()
    return {
        name: 0.0 if parameter.grad is None else parameter.grad.abs().max().item()
        for name, parameter in model.named_parameters()
        # A bias of keys adds the same to all logits of a query.
        if not name.endswith("key.bias")
    }


@pytest.mark.parametrize("make", [fresh, trained])
def test_every_parameter_trains(make):
    found = gradients(make(), text_embeds=question(2))  # 35 tokens, 10 kept
    assert len(found) > 60
    # Far above float32's noise, which is what a cancelled gradient shows.
    assert {name: size for name, size in found.items() if size < 1e-9} == {}
    if make is trained:
        assert {name: size for name, size in found.items() if size < 1e-5} == {}


@pytest.mark.parametrize("settings", [{}, {"text_conditioning": False}])
def test_without_text_only_text_parameters_do_not_train(settings):
    model = trained(**settings)
    found = gradients(model, **({"text_embeds": question(2)} if settings else {}))
    idle = {name for name, size in found.items() if size < 1e-7}
    expected = {name for name in found if any(part in name for part in (*TEXT_ONLY, *ONE_KEY))}
    assert idle == expected


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    expected = gradients(trained(), text_embeds=question(2))
    model = trained()
    # transformers 5.2x renames it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in [*model.scorer.layers, *model.aggregator.layers])
    found = gradients(model, text_embeds=question(2))
    assert found == pytest.approx(expected, rel=1e-4)


def candidates(log_significance, seed=4) -> Candidates:
    count = log_significance.shape[1]
    generator = torch.Generator().manual_seed(seed)
    features, places = torch.randn(1, count, 16, generator=generator), torch.rand(1, count, 3, generator=generator)
    return Candidates(features, torch.ones(1, count, dtype=torch.bool), places, log_significance)


@pytest.mark.parametrize("averages", [0, 3])
def test_a_higher_score_earns_a_higher_weight(averages):
    model = trained(num_selected_tokens=12)
    scores = torch.zeros(1, 12, requires_grad=True)
    rest = candidates(torch.zeros(1, averages), seed=5) if averages else None
    weights = model.aggregator(candidates(F.logsigmoid(scores)), rest, model.question(1, None, None)[0], None)
    assert weights.shape == (1, 8, 12 + averages)
    (gradient,) = torch.autograd.grad(weights[..., 5].sum(), scores, retain_graph=True)
    assert gradient[0, 5] > 0
    # In scale 1 every other token loses; weights sum to 1.
    (gradient,) = torch.autograd.grad(by_query(weights, model)[:, :4, 5].sum(), scores)
    assert (gradient[0, [*range(5), *range(6, 12)]] < 0).all()


@pytest.mark.parametrize("score", [-30.0, -12.0, 0.0, 30.0])
def test_equal_scores_weigh_nothing_however_large(score):
    model = trained(num_selected_tokens=12)
    text, _ = model.question(1, None, None)

    def weights(value):
        level = F.logsigmoid(torch.tensor(value))
        return model.aggregator(candidates(level.expand(1, 12)), candidates(level.expand(1, 3), 5), text, None)

    with torch.no_grad():
        close(weights(score), weights(0.0))


# ---- time and order ----


@pytest.mark.parametrize("make", [fresh, trained])
def test_frame_order_matters(make):
    model, tokens = make(num_selected_tokens=100), video(1, 6, 4)
    forward, backward = run(model, tokens), run(model, tokens.flip(1))
    assert differs(backward.video_tokens, forward.video_tokens) > 0.1
    # Without a sense of time the reversed video would get the reversed weights.
    mirrored = backward.weights.view(1, 8, 6, 4).flip(2).flatten(2)
    assert differs(mirrored, forward.weights) > 0.1


def test_place_in_the_frame_matters():
    model, tokens = trained(num_selected_tokens=100), video(1, 3, 9)
    moved = run(model, tokens.flip(2)).weights.view(1, 8, 3, 9).flip(3).flatten(2)
    assert differs(moved, run(model, tokens).weights) > 0.01


def test_grid_says_where_tokens_lie():
    model, tokens = fresh(num_selected_tokens=100, queries_per_scale=(8, 2, 2)), video(1, 2, 12)
    weights = by_query(run(model, tokens, grid=(2, 6)).weights, model)[0, :8]
    weights = weights.view(2, 4, 2, 2, 6)  # [time, quarter, T, rows, columns]
    top, bottom = weights[:, :2], weights[:, 2:]
    left, right = weights[:, ::2], weights[:, 1::2]
    assert (top[..., 0, :].sum((-1, -2)) > 0.7).all()
    assert (bottom[..., 1, :].sum((-1, -2)) > 0.7).all()
    assert (left[..., :3].sum((-1, -2, -3)) > 0.7).all()
    assert (right[..., 3:].sum((-1, -2, -3)) > 0.7).all()
    with pytest.raises(ValueError, match="grid 3 x 5 does not hold the 12 tokens"):
        model(tokens, grid=(3, 5))


EVEN = torch.arange(8).float()


def test_even_times_are_the_default():
    expected = (EVEN[None] + 0.5) / 8
    close(normalise_times(None, None, 1, 8, EVEN.device), expected)
    for times in (EVEN, 0.04 * EVEN + 7, 60 * EVEN + 1e4, EVEN.long(), EVEN.double() - 3):
        close(normalise_times(times[None], None, 1, 8, EVEN.device), expected)
    model, tokens = trained(), video(1, 8, 4)
    close(run(model, tokens, frame_times=3 * EVEN[None] + 5).weights, run(model, tokens).weights, 1e-4)


def test_offset_and_scale_of_times_do_not_matter():
    model, tokens, times = trained(), video(1, 8, 4), EVEN.square()[None]
    expected = run(model, tokens, frame_times=times).weights
    close(run(model, tokens, frame_times=0.25 * times + 16).weights, expected, 1e-4)
    assert differs(run(model, tokens).weights, expected) > 1e-3


@pytest.mark.parametrize("times", [[[5.0]], [[0.0]]])
def test_time_of_a_single_frame(times):
    times = torch.tensor(times)
    close(normalise_times(times, None, 1, 1, times.device), torch.tensor([[0.5]]))
    # Also where the mask leaves only one.
    mask = torch.tensor([[True, False, False]])
    found = normalise_times(torch.tensor([[5.0, 9.0, 0.0]]), mask, 1, 3, times.device)
    assert found[0, 0] == 0.5 and found.isfinite().all()


def test_equal_times_count_as_even():
    found = normalise_times(torch.full((1, 4), 3.0), None, 1, 4, EVEN.device)
    close(found, torch.tensor([[0.125, 0.375, 0.625, 0.875]]))


def test_times_stay_in_order_and_range():
    times = torch.tensor([[0.0, 0.1, 0.2, 9.0, 9.1], [0.0, 5.0, 6.0, 1e6, -1e6]])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = normalise_times(times, mask, 2, 5, times.device)
    assert (found >= 0).all() and (found <= 1).all()
    assert (found[0].diff() > 0).all() and (found[1, :3].diff() > 0).all()
    close(found[1:, :3], normalise_times(times[1:, :3], None, 1, 3, times.device))  # padding's times are not read


def test_uneven_times_move_weights():
    # Seven frames in the first second, one much later: the cells of the second half of the video see only that one.
    model = fresh(num_selected_tokens=100)
    times = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 10.0]])
    even = by_query(run(model, video(1, 8, 4)).weights, model).view(8, 8, 4).sum(-1)
    uneven = by_query(run(model, video(1, 8, 4), frame_times=times).weights, model).view(8, 8, 4).sum(-1)
    assert uneven[3, 7] > 0.95  # scale 1, last of four cells
    assert even[3, 7] < 0.75
    assert uneven[0, :7].sum() > 0.99


# ---- top-k ----


def test_top_k_takes_the_highest_scores_in_the_videos_order():
    scores = torch.randperm(60, generator=torch.Generator().manual_seed(0)).view(2, 5, 6).float()
    index, mask = top_k(scores, None, 7)
    assert mask.all() and index.shape == (2, 7)
    assert (index.diff() > 0).all()
    best = scores.flatten(1).topk(7).indices.sort().values
    assert torch.equal(index, best)


def test_top_k_leaves_padding_out_and_puts_it_last():
    scores = torch.randn(3, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0]]).bool()
    scores[~mask] = 100.0  # padding may score anything
    index, kept = top_k(scores, mask, 8)
    assert kept.sum(-1).tolist() == [8, 6, 3]
    assert index[1, :6].tolist() == list(range(6))
    assert index[2, :3].tolist() == [3, 4, 5]
    assert (kept.long().diff() <= 0).all()
    assert (index >= 0).all() and (index < 12).all()  # what is not kept must still be safe to gather


@pytest.mark.parametrize("mask", [None, torch.ones(1, 2, dtype=torch.bool)])
def test_k_above_the_number_of_tokens_keeps_all(mask):
    index, kept = top_k(torch.randn(1, 2, 3), mask, 1000)
    assert index.tolist() == [list(range(6))]
    assert kept.all()


@pytest.mark.parametrize(
    "places",
    [64, 81, 128, 256, pytest.param(144, id="144 of Molmo"), pytest.param(729, id="729 of Mipha")],
)
def test_ties_spread_over_the_video(places):
    frames, k = 64, 1024
    index, _ = top_k(torch.zeros(1, frames, places), None, k)
    per_frame = (index[0] // places).bincount(minlength=frames)
    assert per_frame.min() >= 0.75 * k / frames and per_frame.max() <= 1.25 * k / frames
    # No corner of the picture is never seen, nor one place kept in frame after frame.
    per_place = (index[0] % places).bincount(minlength=places)
    assert (per_place > 0).float().mean() > 0.95
    assert per_place.max() <= 2 * math.ceil(k / places)


def test_a_fresh_tokenizer_samples_every_moment():
    model = fresh(bottleneck_size=64, num_selected_tokens=64, **PLAIN)
    index, _ = top_k(run(model, video(1, 16, 16)).scores, None, 64)
    per_frame = (index[0] // 16).bincount(minlength=16)
    assert per_frame.min() >= 2 and per_frame.max() <= 6


def test_without_a_remainder_selected_tokens_are_the_only_ones_weighed():
    model, tokens = trained(**PLAIN), video(1, 5, 7)
    out = run(model, tokens)
    index, _ = top_k(out.scores, None, 10)
    used = (out.weights[0] > 0).any(0).nonzero().flatten()
    assert torch.equal(used, index[0])


# ---- what is new, and what is left ----


def test_novelty_is_where_a_picture_changes():
    tokens = video(1, 1, 6).expand(1, 8, 6, WIDTH).clone()
    tokens[0, 5:, 2] = video(1, 1, 1, seed=9)[0, 0, 0]
    change = news_of(tokens, None)
    assert change.shape == (1, 8, 6)
    expected = (1 - torch.nn.functional.cosine_similarity(tokens[0, 5, 2], tokens[0, 4, 2], dim=0)).item()
    first = 1 - torch.nn.functional.cosine_similarity(tokens[0, 0], tokens[0, 0].mean(dim=0, keepdim=True), dim=-1)
    largest = max(expected, first.max().item())
    close(change[0, 0], first / largest - 0.5)  # what stands out in the first frame
    close(change[0, 5, 2], torch.tensor(expected / largest - 0.5))
    change[0, 0], change[0, 5, 2] = -0.5, -0.5
    close(change, torch.full_like(change, -0.5))
    close(news_of(3 * tokens, None), news_of(tokens, None))  # whatever the scale


def test_novelty_of_a_video_of_one_colour_is_finite():
    assert news_of(torch.ones(1, 4, 6, WIDTH), None).isfinite().all()


def test_novelty_knows_padding():
    tokens = video(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    change = news_of(tokens, mask)
    close(change[0, :3], news_of(tokens[:1, :3], None)[0])
    close(change[1, 1:], news_of(tokens[1:, 1:], None)[0])
    tokens[0, 3], tokens[1, 0] = 99, -99
    close(news_of(tokens, mask)[mask], change[mask])


def test_a_fresh_tokenizer_keeps_the_only_event_of_a_quiet_video():
    tokens = video(1, 1, 16).expand(1, 64, 16, WIDTH).clone()
    tokens[0, 40:42, 3] = video(1, 1, 1, seed=9)[0, 0, 0]
    out = run(fresh(num_selected_tokens=32), tokens)
    index, _ = top_k(out.scores, None, 32)
    assert 40 * 16 + 3 in index[0].tolist()


def test_the_remainder_averages_what_is_left_by_stretches_of_time():
    scores = torch.zeros(1, 4, 3)
    index, kept = torch.tensor([[0, 1, 2, 4]]), torch.ones(1, 4, dtype=torch.bool)
    rest = remainder(scores, index, kept, 2)
    assert rest.mask.tolist() == [[True, True]]
    expected = torch.zeros(2, 12)
    expected[0, [3, 5]] = 1 / 2  # frames 0 and 1, without the four that were kept
    expected[1, 6:] = 1 / 6
    close(rest.share[0], expected)
    values = video(1, 4, 3).flatten(1, 2)
    close(rest.pool(values, None)[0], expected @ values[0])
    close(rest.log_significance, torch.zeros(1, 2))


def test_significant_tokens_weigh_more_in_the_remainder():
    scores = torch.randn(1, 2, 4)
    rest = remainder(scores, torch.tensor([[0]]), torch.ones(1, 1).bool(), 1)
    close(rest.share[0, 0, 1:], scores.flatten()[1:].softmax(0))
    close(rest.log_significance[0, 0], scores.flatten()[1:].exp().mean().log())


def test_stretches_without_a_remainder_weigh_nothing():
    rest = remainder(torch.zeros(1, 4, 3), torch.arange(6)[None], torch.ones(1, 6).bool(), 2)
    assert rest.mask.tolist() == [[False, True]]
    assert (rest.share[0, 0] == 0).all() and rest.share.isfinite().all()


def test_scores_learn_from_tokens_that_were_not_kept():
    model = fresh(num_selected_tokens=2)
    tokens = video(1, 4, 3)
    index, _ = top_k(run(model, tokens).scores, None, 2)
    scores = []
    model.scorer.register_forward_hook(lambda module, inputs, output: scores.append(output[1]))
    out = model(tokens)
    (gradient,) = torch.autograd.grad(out.video_tokens.square().sum(), scores[0])
    assert (gradient.flatten() != 0).sum() > 2


# ---- MTP ----


@pytest.mark.parametrize("kernel, length", [(1, 5), (2, 6), (2, 5), (4, 8), (4, 7), (4, 3)])
def test_pooling_means_and_partial_last_window(kernel, length):
    x = torch.randn(2, length, 3)
    windows = PoolingWindows(torch.ones(2, length, dtype=torch.bool), kernel)
    expected = torch.stack([part.mean(1) for part in x.split(kernel, dim=1)], dim=1)
    close(windows.pool(x), expected)
    assert windows.mask.shape == (2, math.ceil(length / kernel)) and windows.mask.all()


def test_pooling_ignores_masked_tokens():
    x = torch.randn(2, 7, 3)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 3:] = False
    for kernel in (2, 4):
        windows = PoolingWindows(mask, kernel)
        pooled = windows.pool(x.masked_fill(~mask[..., None], 1e4))
        alone = PoolingWindows(mask[1:, :3], kernel)
        count = alone.mask.shape[1]
        close(pooled[1:, :count], alone.pool(x[1:, :3]))
        assert windows.mask[0].all()
        assert windows.mask[1].tolist() == [True] * count + [False] * (windows.mask.shape[1] - count)
        assert (windows.spread(torch.ones(2, 1, windows.mask.shape[1]))[1, 0, 3:] == 0).all()


@pytest.mark.parametrize("kernel, length", [(1, 5), (2, 5), (4, 7), (4, 8)])
def test_spread_is_the_transpose_of_pool(kernel, length):
    mask = torch.ones(1, length, dtype=torch.bool)
    mask[0, length - 2 :] = False
    windows = PoolingWindows(mask, kernel)
    matrix = windows.pool(torch.eye(length)[None])[0]  # [W, length]: pooling the identity gives the map itself
    if kernel == 1:
        matrix = matrix * mask[0]
    weights = torch.rand(1, 6, matrix.shape[0])
    close(windows.spread(weights)[0], weights[0] @ matrix)
    weights = weights.masked_fill(~windows.mask[:, None], 0)
    close(windows.spread(weights).sum(-1), weights.sum(-1))  # what goes in comes out


# ---- useful before training ----

CELLS = {"num_selected_tokens": 10**6, "queries_per_scale": (32, 16, 8)}


def by_query(weights, model):
    """W in the order of queries, scale after scale; the LLM reads its rows in the order of time."""
    return weights[:, torch.tensor(model.config.token_order()).argsort()]


def test_tokens_are_read_in_the_order_of_time_whatever_their_scale():
    model = fresh(**CELLS)
    weights = run(model, video(1, 16, 16)).weights[0]
    times = centers_of_mass(weights, 16, 4)[:, 0]
    assert (times.diff() > -0.1).all()  # a cell of half the video leans inwards
    assert times.split((32, 16, 8))[0].max() < 0.7  # not scale after scale
    assert sorted(model.config.token_order()) == list(range(56))


def centers_of_mass(weights, frames, side):
    """[M, 3]: where each query looks, in time, height and width."""
    weights = weights.view(-1, frames, side, side)
    time, place = (torch.arange(frames) + 0.5) / frames, (torch.arange(side) + 0.5) / side
    return torch.stack([weights.sum((2, 3)) @ time, weights.sum((1, 3)) @ place, weights.sum((1, 2)) @ place], dim=-1)


def test_queries_start_at_their_cells():
    frames, side = 16, 8
    model = fresh(**CELLS)
    weights = by_query(run(model, video(1, frames, side**2)).weights, model)[0]
    found = centers_of_mass(weights, frames, side)
    cells = torch.tensor([center for center, _ in model.config.query_cells()])
    # A cell's edge is soft and the video ends, so its mass leans inwards; a quarter of the video is still far off.
    assert (found - cells).abs().max() < 0.12
    start = 0
    for count in model.config.queries_per_scale:
        nearest = torch.cdist(found[start : start + count], cells[start : start + count]).argmin(-1)
        assert torch.equal(nearest, torch.arange(count))
        start += count
    # Concentrated, not just centred: most weight lies within two widths in time.
    for row, (center, width) in zip(weights, model.config.query_cells(), strict=True):
        time = (torch.arange(frames) + 0.5) / frames
        near = (time - center[0]).abs() <= 2 * width[0] + 0.5 / frames
        assert row.view(frames, -1).sum(-1)[near].sum() > 0.9


@pytest.mark.parametrize("k", [48, 10**6])
@pytest.mark.parametrize("frames", [1, 2, 7, 64])
def test_any_number_of_frames_in_temporal_order(frames, k):
    model = fresh(**{**CELLS, "num_selected_tokens": k})
    out = run(model, video(1, frames, 16))
    close(out.weights.sum(-1), torch.ones(1, 56))
    assert out.video_tokens.isfinite().all()
    times = centers_of_mass(by_query(out.weights, model)[0], frames, 4)[:, 0]
    for part, count in zip(times.split((32, 16, 8)), (32, 16, 8), strict=True):
        steps = part.view(-1, 4).mean(-1)  # four quarters of the picture a step
        assert len(steps) == count // 4
        assert (steps.diff() > -1e-3).all()  # with few frames neighbouring cells see the same frame
        if frames == 64:
            assert (steps.diff() > 0.5 / len(steps)).all()


def test_denser_sampling_of_one_video_gives_nearby_tokens():
    model = fresh(**{**CELLS, "hidden_size": WIDTH})
    start, end, wobble = video(3, 1, 16).split(1)

    def sample(frames):
        time = ((torch.arange(frames) + 0.5) / frames)[None, :, None, None]
        return start * (1 - time) + end * time + wobble * (2 * math.pi * time).sin()

    sparse, dense = (run(model, sample(frames)).video_tokens[0] for frames in (16, 32))
    similar = F.cosine_similarity(sparse[:, None], dense[None], dim=-1)
    assert similar.diagonal().min() > 0.97
    assert differs(dense, sparse) < 0.1


def test_neighbouring_frames_have_different_places():
    embed = PlaceEmbedding(1, 64)
    with torch.no_grad():
        for frames in (2, 64, 512):
            places = embed(((torch.arange(frames) + 0.5) / frames)[:, None], torch.float32)
            assert places.shape == (frames, 64)
            assert (places.diff(dim=0).norm(dim=-1) > 0.2).all()


# ---- backends and precision ----

BATCH = {
    "frame_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "frame_times": torch.tensor([[0.0, 1, 2, 4, 8], [0, 3, 4, 0, 0]]),
    "text_embeds": question(2),
    "text_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
}


def test_eager_and_sdpa_agree(monkeypatch):
    fused, calls = F.scaled_dot_product_attention, []

    def counting(*args, **kwargs):
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(video_tokenizer.F, "scaled_dot_product_attention", counting)
    model = trained()
    assert model.config._attn_implementation == "sdpa"
    expected = run(model, video(2, 5, 7), **BATCH)
    assert calls
    calls.clear()
    model.set_attn_implementation("eager")
    found = run(model, video(2, 5, 7), **BATCH)
    assert not calls
    close(found.weights, expected.weights)
    close(found.scores, expected.scores)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, attention):
    model = fresh(attn_implementation=attention).to(dtype)
    half = run(model, video(2, 5, 7).to(dtype), **{**BATCH, "text_embeds": question(2).to(dtype)})
    assert half.video_tokens.dtype == half.weights.dtype == dtype
    assert half.scores.dtype == torch.float32
    assert half.video_tokens.isfinite().all()
    close(half.weights.float().sum(-1), torch.ones(2, 8), 0.01)
    # With all tokens kept, rounding cannot change the selection, and the numbers must be float32's.
    model.config.num_selected_tokens = 35
    half = run(model, video(2, 5, 7).to(dtype), **{**BATCH, "text_embeds": question(2).to(dtype)})
    exact = run(
        model.float(), video(2, 5, 7).to(dtype).float(), **{**BATCH, "text_embeds": question(2).to(dtype).float()}
    )
    assert differs(half.weights.float(), exact.weights) < 0.02
    assert differs(half.video_tokens.float(), exact.video_tokens) < 0.02


@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_half_precision_with_large_and_small_tokens(scale):
    # Visual tokens of some projectors reach hundreds; float16 ends at 65504.
    model = fresh().half()
    tokens = (scale * video(1, 5, 7)).half()
    out = run(model, tokens)
    assert out.video_tokens.isfinite().all() and out.scores.isfinite().all()
    assert differs(out.weights.float(), run(model, video(1, 5, 7).half()).weights.float()) < 0.02


def test_autocast_stays_close_to_float32():
    model = fresh(num_selected_tokens=35)
    exact = run(model, video(2, 5, 7), **BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(model, video(2, 5, 7), **BATCH)
    assert differs(cast.weights.float(), exact.weights) < 0.02


def test_compiles_whole():
    model = trained()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected, found = run(model, video(2, 5, 7), **BATCH), run(compiled, video(2, 5, 7), **BATCH)
    close(found.video_tokens, expected.video_tokens)
    close(found.weights, expected.weights)


def test_compiled_once_for_ten_lengths():
    """Of videos and of questions."""
    model, programs = trained(), []

    def backend(program, inputs):
        programs.append(program)
        return program.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for frames in (9, 10, 12, 17, 20, 33, 50, 77, 100, 200):
        tokens, text = video(1, frames, 16), question(words=frames % 13 + 2)
        expected, found = (run(one, tokens, text_embeds=text) for one in (model, compiled))
        close(found.video_tokens, expected.video_tokens)
    assert len(programs) == 1


def test_nothing_depends_on_the_values():
    # On the meta device there are none: anything read back to Python, or made on another device, raises.
    inputs = {name: value.to("meta") for name, value in BATCH.items()}
    out = fresh().to("meta")(video(2, 5, 7).to("meta"), output_weights=True, **inputs)
    assert out.video_tokens.shape == (2, 8, WIDTH)
    assert out.weights.shape == (2, 8, 35)


def test_weights_kept_off_the_device_until_needed():
    # As `device_map` does for modules that do not fit: each module's weights come only when it is called.
    accelerate = pytest.importorskip("accelerate")
    model = trained()
    expected = run(model, video(2, 5, 7), **BATCH)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    close(run(model, video(2, 5, 7), **BATCH).weights, expected.weights)


# ---- saving, loading, initial values ----


def test_saved_and_loaded_bit_for_bit(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    loaded, info = LinearVideoTokenizer.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    # Not bit for bit: loaded tensors may be aligned otherwise in memory, which changes the order of sums.
    close(run(loaded.eval(), video()).video_tokens, run(model, video()).video_tokens)


def check_initial(name, value, config):
    cells = config.query_cells()
    if name.endswith("centers"):
        close(value, torch.tensor([center for center, _ in cells]))
    elif name.endswith("log_widths"):
        close(value.exp(), torch.tensor([width for _, width in cells]))
    elif name == "scorer.novelty_gain":
        assert value.item() == config.novelty_gain
    elif name == "scorer.score.weight":
        assert 0 < value.abs().max() < 1e-3  # nearly equal scores
    elif "norm" in name and name.endswith("weight"):
        assert (value == 1).all()
    elif name.endswith("bias"):
        assert (value == 0).all()
    elif "feed_forward.0" in name:  # a norm without the name
        assert (value == 1).all()
    else:
        std = config.initializer_range
        assert value.abs().max() < 6 * std
        assert value.std() > 0.5 * std


@pytest.mark.parametrize("settings", [{}, {"initializer_range": 0.1}])
def test_initial_values(settings):
    model = fresh(**settings)
    for name, parameter in model.named_parameters():
        check_initial(name, parameter.detach(), model.config)


def test_a_fresh_tokenizer_scores_nearly_alike_but_for_novelty():
    scores = run(fresh(novelty_gain=0), video(2, 5, 7)).scores
    assert 0 < scores.std() < 5e-3


@pytest.mark.parametrize(
    "missing",
    [
        "aggregator.centers",
        "aggregator.log_widths",
        "aggregator.queries",
        "question.no_text",
        "scorer.text_attention.value.weight",
        "scorer.score.weight",
        "scorer.novelty_gain",
        "scorer.norm.weight",
        "scorer.embed_time.linear.weight",
        "aggregator.layers.0.text_attention.output.bias",
    ],
)
def test_what_a_checkpoint_lacks_gets_its_initial_value(tmp_path, missing):
    # Loading builds the model on the meta device, where constructors write nothing.
    model = trained()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    saved = load_file(file)
    del saved[missing]
    save_file(saved, file, metadata={"format": "pt"})
    torch.manual_seed(3)
    loaded, info = LinearVideoTokenizer.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {missing}
    state = loaded.state_dict()
    check_initial(missing, state.pop(missing), loaded.config)
    assert all(torch.equal(value, saved[name]) for name, value in state.items())


def test_default_size_at_a_real_width():
    with torch.device("meta"):
        model = LinearVideoTokenizer(LinVTConfig(hidden_size=3584))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 5e6 < count <= 60e6


def test_width_must_be_known():
    with pytest.raises(ValueError, match="neither base_config nor hidden_size"):
        LinearVideoTokenizer(LinVTConfig())


# ---- long videos: windows, frames that come a few at a time, and what is stored of them ----


def streamed(model, tokens, times=None, chunk=5) -> VideoTokens:
    """Of one video [1, T, N, D], a few frames at a time."""
    running = RunningTokens(model, tokens.shape[1], times, (2, 2))
    for part in tokens[0].split(chunk):
        running.add(part)
    return running.finish()


def same_tokens(one: VideoTokens, other: VideoTokens) -> None:
    assert one.tensors().keys() == other.tensors().keys()
    for name, value in one.tensors().items():
        close(value, other.tensors()[name])


@pytest.mark.parametrize(("frames", "size"), [(8, 8), (9, 8), (30, 8), (31, 13), (12, 3), (5, 1)])
def test_windows_cover_every_frame_once(frames, size):
    windows, overlap = windows_of(frames, 4, 4 * size + 3), size // 4
    assert [frame for window in windows for frame in range(window.first, window.last)] == list(range(frames))
    for window in windows:
        assert window.start <= window.first < window.last <= window.stop <= window.start + size
        assert window.first - window.start >= overlap // 2 or window.start == 0  # none stands at an edge alone
        assert window.stop - window.last >= overlap // 2 or window.stop == frames
    assert len(windows) == 1 or len(windows) == math.ceil((frames - overlap) / (size - overlap))


def test_one_window_or_several():
    tokens = video(1, 20, 4)
    whole, split = trained(), trained(score_window=32)
    near = trained(num_scoring_layers=0), trained(num_scoring_layers=0, score_window=32)
    close(*(run(model, tokens).video_tokens for model in near))  # without attention across frames all are alone
    assert differs(run(split, tokens).video_tokens, run(whole, tokens).video_tokens) > 1e-3
    changed = tokens.clone()
    changed[0, 19] = 9
    one, other = (split.refine(t).features.view(1, 20, 4, -1) for t in (tokens, changed))
    close(one[:, :13], other[:, :13])  # the last window, from frame 12 on, has its own from frame 13 on
    assert differs(one[:, 13:14], other[:, 13:14]) > 1e-4


def test_windows_of_a_padded_batch():
    model, tokens = trained(score_window=16), video(2, 11, 4)
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0], mask[1, :3] = True, True
    both = run(model, tokens, frame_mask=mask)
    assert both.video_tokens.isfinite().all()
    close(both.video_tokens[0], run(model, tokens[:1]).video_tokens[0])
    close(both.video_tokens[1], run(model, tokens[1:, :3]).video_tokens[0])


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("window", [{}, {"score_window": 32}, {"score_window": 12}])
def test_frames_that_come_a_few_at_a_time(chunk, window):
    model, tokens = trained(**window), video(1, 23, 4)
    times = torch.linspace(0, 60, 23).square()
    same_tokens(streamed(model, tokens, times, chunk), model.refine(tokens, None, times[None], (2, 2)))


def test_asked_again_is_asked_anew():
    model, tokens = trained(), video(1, 12, 4)
    stored = streamed(model, tokens)
    for seed in range(3):
        text = question(seed=seed)
        once, again = run(model, tokens, text_embeds=text), model.condense(stored, text, output_weights=True)
        close(again.video_tokens, once.video_tokens)
        close(again.weights, once.weights)
        close(again.scores.view(1, 12, 4), once.scores)


@pytest.mark.parametrize("room", [64, 28, 24])  # the last two are as many as a window has of its own
def test_what_is_stored_of_a_long_video(room):
    settings = {"num_stored_tokens": room, "score_window": 32}
    model, tokens = trained(**settings), video(1, 40, 4)
    stored = streamed(model, tokens, chunk=6)
    assert stored.values.shape == (1, room, WIDTH) and len(stored.index[0].unique()) == room
    everything = model.refine(tokens, grid=(2, 2))
    for name in ("values", "features", "change", "where"):  # what is stored is as it was
        whole = getattr(everything, name)
        picked = whole[0, stored.index[0]]
        close(getattr(stored, name)[0], picked)
    close(stored.largest, everything.largest)
    # Nothing is lost: what is dropped is in the averages, once.
    left = torch.ones(160, dtype=torch.bool)
    left[stored.index[0]] = False
    assert stored.dropped.count.sum() == left.sum() == 160 - room
    for number in range(4):
        stretch = left & ((everything.where[0, :, 0] * 4).long().clamp(max=3) == number)
        assert stored.dropped.count[0, number] == stretch.sum()
        among = everything.values[0, stretch]
        mean = stored.dropped.values[0, number]
        assert (mean >= among.amin(dim=0) - 1e-5).all() and (mean <= among.amax(dim=0) + 1e-5).all()
    out = model.condense(stored, question(), output_weights=True)
    assert out.video_tokens.isfinite().all() and out.scores.shape == (1, room)
    # W says what each stored token weighs, and what the averages of the others do.
    assert out.weights.shape == (1, 8, room) and out.dropped_weights.shape == (1, 8, 4)
    assert min(out.weights.min(), out.dropped_weights.min()) >= 0 and out.dropped_weights.max() > 1e-3
    close(out.weights.sum(-1) + out.dropped_weights.sum(-1), torch.ones(1, 8))
    close(out.video_tokens, out.weights @ stored.values + out.dropped_weights @ stored.dropped.values)
    assert streamed(trained(**settings, **PLAIN), tokens).dropped is None


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"novelty_gain": 0.0}, {"num_selected_tokens": 3}])
def test_an_average_stands_for_what_is_like_it(settings):
    """Tokens that say the same need not be stored: what the averages make of them is what they would make."""
    model = trained(**settings)
    for text in (None, question(seed=3)):
        tokens = model.refine(video(1, 12, 4), grid=(2, 2))
        stretches = torch.arange(48).view(4, 12)  # three frames each
        least = stretches.gather(1, model.condense(tokens, text).scores.view(4, 12).argmin(dim=1, keepdim=True))
        alike = stretches[:, 6:]
        for name in ("values", "features", "change"):
            value = getattr(tokens, name)
            value[0, alike] = value[0, least].clone()
        gone, stored = alike[:, 1:], torch.ones(48, dtype=torch.bool)
        stored[gone] = False
        own = {name: value for name, value in tokens.tensors().items() if name != "largest"}
        averages = {name: value[:, gone].mean(dim=2) for name, value in own.items() if name != "index"}
        fewer = VideoTokens(
            **{name: value[:, stored] for name, value in own.items()},
            largest=tokens.largest,
            mask=None,
            places=4,
            dropped=Dropped(**averages, count=torch.full((1, 4), 5)),
        )
        whole, some = (model.condense(given, text, output_weights=True) for given in (tokens, fewer))
        close(some.video_tokens, whole.video_tokens)
        weights = whole.weights[:, :, gone].sum(dim=-1)
        close(some.dropped_weights, weights)
        assert weights.max() > 0.01


def test_the_stored_tokens_are_the_most_significant():
    model = fresh(num_stored_tokens=64, score_window=32, novelty_gain=12.0)
    tokens = video(1, 1, 4).expand(1, 200, 4, WIDTH).clone()
    tokens[0, 150:152, 3] = video(1, 1, 1, seed=9)[0, 0, 0]  # the only event
    stored = streamed(model, tokens)
    assert {150 * 4 + 3, 152 * 4 + 3} <= set(stored.index[0].tolist())
    assert (stored.index[0] // 4).unique().numel() > 20  # and something of every moment


def test_the_best_of_each_stretch():
    torch.manual_seed(0)
    scores, stretch = torch.randn(1000), torch.arange(1000) // 32
    chosen = best_of_each(scores, stretch, 256)
    assert chosen.sum() == 256
    for number in range(32):
        inside = (stretch == number).nonzero()[:, 0]
        best = inside[scores[inside].topk(min(4, len(inside))).indices]
        assert chosen[best].all()
    outside = scores[~chosen].max()
    assert (scores[chosen] > outside).sum() >= 128
    # Asked again of what was chosen and more, as of a set that grows.
    more = torch.randn(200)
    grown = torch.cat([scores[chosen], more]), torch.cat([stretch[chosen], torch.full((200,), 31)])
    whole = torch.cat([scores, more]), torch.cat([stretch, torch.full((200,), 31)])
    assert sorted(grown[0][best_of_each(*grown, 256)].tolist()) == sorted(whole[0][best_of_each(*whole, 256)].tolist())


def test_frames_that_do_not_come():
    running = RunningTokens(fresh(), 5, None, (2, 2))
    running.add(video(1, 3, 4)[0])
    with pytest.raises(ValueError, match="5 frames were promised, and 3 came"):
        running.finish()
    with pytest.raises(ValueError, match="5 frames were promised, and more came"):
        running.add(video(1, 3, 4)[0])
