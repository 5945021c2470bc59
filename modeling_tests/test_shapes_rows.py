"""Rows of the comparison: each reads as many tokens as it says, and has off what its name says."""

import dataclasses
import json

import pytest
import torch
from transformers import TrainerCallback

from linvt_hf.modeling_linvt import LinVTForConditionalGeneration
from linvt_hf.shapes import image_llm, results
from linvt_hf.shapes.bases import INTERNVL2
from linvt_hf.shapes.rows import CURVES, KEPT, ROWS, TABLE, TOKENS
from linvt_hf.shapes.videos import write_split
from linvt_hf.training.settings import read_settings

BY_NAME = {row.name: row for row in ROWS}


class Processor:
    num_video_tokens = 32


def build(name: str) -> LinVTForConditionalGeneration:
    """A fresh model of a row, with the settings of `make shapes`, and the places that its prompts hold."""
    row = BY_NAME[name]
    torch.manual_seed(0)
    base = INTERNVL2.build(image_llm.build_tokenizer())
    settings = {**read_settings("shapes/stage1").linvt, **row.settings}
    model = LinVTForConditionalGeneration.from_image_llm(base, 600, **settings)
    processor = Processor()
    row.apply(model, processor)
    assert processor.num_video_tokens == row.tokens
    return model.eval()


def condense(model, frames: torch.Tensor, **inputs):
    return model.video_tokenizer(frames, grid=(4, 4), **inputs)


def frames(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 16, 16, 128, generator=torch.Generator().manual_seed(seed))


WORDS = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))


def test_rows_have_names_of_their_own_and_curves_share_the_tables_rows():
    assert len({row.name for row in (*TABLE, *ROWS)}) == len(ROWS)
    kept = read_settings("shapes/stage1").linvt["num_selected_tokens"]
    for rows in CURVES.values():
        assert tuple(row.settings.get("num_selected_tokens", kept) for row in rows) == KEPT


@pytest.mark.parametrize("name", BY_NAME)
def test_a_row_reads_as_many_tokens_as_it_says(name):
    model = build(name)
    with torch.no_grad():
        out = condense(model, frames(), text_embeds=WORDS)
    assert out.video_tokens.shape == (2, BY_NAME[name].tokens, 128) and out.video_tokens.isfinite().all()


@pytest.mark.parametrize("name", ["LinVT", "no text"])
def test_text(name):
    model = build(name)
    with torch.no_grad():
        asked, other = (condense(model, frames(), text_embeds=sign * WORDS).video_tokens for sign in (1, -1))
    assert torch.equal(asked, other) == (name == "no text")


@pytest.mark.parametrize("name", ["LinVT", "no score gradient"])
def test_score_gradient(name):
    model = build(name).train()
    condense(model, frames(), text_embeds=WORDS).video_tokens.square().sum().backward()
    gradient = model.video_tokenizer.scorer.score.weight.grad
    assert (gradient is None) == (name == "no score gradient")


@pytest.mark.parametrize("name", ["LinVT", "no temporal positions"])
def test_temporal_positions(name):
    """Both parts that could read the time are told none, whatever the frames' times are."""
    model = build(name)
    told = []
    scorer, aggregator = model.video_tokenizer.scorer, model.video_tokenizer.aggregator
    scorer.embed_time.register_forward_pre_hook(lambda module, inputs: told.append(inputs[0]))  # after the row's own
    aggregator.register_forward_pre_hook(lambda module, inputs: told.extend(x.places[..., 0] for x in inputs[:2]))
    for times in (None, torch.arange(16.0).square().expand(2, -1)):
        with torch.no_grad():
            condense(model, frames(), frame_times=times)
    assert len(told) == 6
    assert all((times == 0.5).all() for times in told) == (name == "no temporal positions")


@pytest.mark.parametrize("name", ["LinVT, k = 128", "plain top-k, k = 128"])
def test_plain_top_k(name):
    """Where nothing was learned, plain top-k takes no notice of what is new, and training cannot bring that back."""
    model = build(name)
    plain = name.startswith("plain")
    assert any("novelty" in name for name, _ in model.video_tokenizer.named_parameters()) != plain
    video = torch.ones(1, 16, 16, 128)
    video[:, 9] = frames()[0, 9]  # one frame is unlike the others
    with torch.no_grad():
        scores = condense(model, video).scores
    assert (scores[0, 9].mean() > scores[0, 2:9].mean() + 0.5) != plain


@pytest.mark.parametrize("name", ["LinVT", "values through a projection"])
def test_values(name):
    model = build(name)
    with torch.no_grad():
        start = condense(model, frames()).video_tokens
        assert torch.allclose(start, condense(build("LinVT"), frames()).video_tokens, atol=1e-5)
        for parameter in model.video_tokenizer.parameters():  # as if it had learned
            parameter.mul_(1.1)
        out = condense(model, frames(), output_weights=True)
        combined = out.weights @ frames().flatten(1, 2)
    assert torch.allclose(out.video_tokens, combined, atol=1e-4) == (name == "LinVT")


def test_random_queries_are_no_cells():
    """On frames that are all alike, a cell's largest weight is far above its mean."""
    weights = {}
    for name in ("no top-k", "random query initialisation"):
        model = build(name)
        with torch.no_grad():
            weights[name] = condense(model, torch.ones(1, 16, 16, 128), output_weights=True).weights[0, :16]
    apart = {name: (w.max(dim=-1).values / w[w > 0].mean()).mean() for name, w in weights.items()}
    assert 2 * apart["random query initialisation"] < apart["no top-k"]


def test_only_linvt_that_is_not_frozen_learns():
    assert not BY_NAME["LinVT untrained"].learns and not BY_NAME["uniform pooling"].learns and BY_NAME["LinVT"].learns


def test_rows_of_the_curve_alone_have_one_seed(tmp_path):
    seeds = {row.name: [] for row in results.ROWS}
    for job in results.all_jobs(tmp_path, 3):
        seeds[job.row.name].append(job.seed)
    assert seeds["LinVT"] == seeds["no top-k"] == seeds["question only"] == [0, 1, 2]
    assert seeds["LinVT, k = 32"] == seeds["plain top-k, k = 64"] == [0]


def test_tables_show_what_is_there(tmp_path):
    def result(seed, right):
        kinds = {kind: {"exact": right, "options": right} for kind in results.FRAMES}
        return {"row": "LinVT", "seed": seed, "untrained": kinds, "trained": kinds}

    jobs = [results.Job(BY_NAME["LinVT"], seed, tmp_path) for seed in range(3)]
    for job, right in zip(jobs, (0.9, 0.8, 0.1), strict=True):
        recipe = job.recipe() if job.seed < 2 else "another"
        job.file.write_text(json.dumps({**result(job.seed, right), "recipe": recipe}))
    found = results.read_results(jobs)
    assert results.table(found).splitlines()[2:] == ["| LinVT | 32 |" + " 85.0 ± 7.1 |" * 4]
    assert "| LinVT, video |  |  | 85.0 ± 7.1 |  |  |" in results.curve(found)
    assert KEPT[0] == TOKENS

    page = tmp_path / "page.md"
    page.write_text(
        "".join(f"{n}\n<!-- shapes {n} -->\nold\n<!-- end of shapes {n} -->\n" for n in ("table", "curve"))
    )
    results.write_tables(found, page)
    assert "old" not in page.read_text() and results.table(found) in page.read_text()
    before = page.read_text()
    results.write_tables(found, page)
    assert page.read_text() == before
    page.write_text("nothing here")
    with pytest.raises(ValueError, match="page.md needs the lines '<!-- shapes table -->'"):
        results.write_tables(found, page)


def test_a_row_is_trained_measured_and_not_run_again(tmp_path, monkeypatch, capsys):
    """The way that `make shapes-results` goes, small."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = image_llm.build_tokenizer()
    image_llm.save(INTERNVL2.build(tokenizer), tokenizer, tmp_path / "build/shapes/image-llm")
    for kind in ("video", "image"):
        for split in ("train", "test"):
            write_split(tmp_path / "build/shapes/data", kind, split, 2)
    fewer = {kind: frames for kind, frames in results.FRAMES.items() if kind != "long"}
    monkeypatch.setattr(results, "FRAMES", fewer)
    short = "[build/shapes/data/video-train-captions.jsonl,build/shapes/data/video-train.jsonl]"
    overrides = ("max_steps=2", "batch_size=4", f"data={short}", "log_every=1")
    for name in ("LinVT", "uniform pooling", "LinVT untrained"):
        job = results.Job(BY_NAME[name], 1, tmp_path / "results", overrides)
        assert not job.is_done()
        results._run_job(name, 1, tmp_path / "results", overrides)
        result = json.loads(job.file.read_text())
        assert job.is_done() and not dataclasses.replace(job, overrides=("max_steps=3",)).is_done()
        as_much = ("batch_size=2", "accumulation=6", "workers=1")  # a step holds 12 samples, as before
        assert dataclasses.replace(job, overrides=(*overrides, *as_much)).is_done()
        assert not dataclasses.replace(job, overrides=(*overrides, "accumulation=1")).is_done()
        assert result["made with"]["torch"] == torch.__version__
        assert len(result["stage2"]) == 2 and ("stage1" in result) == (name == "LinVT")
        assert result["pictures with adapters off"] == result["untrained"]["image"]
        assert result["trained"]["video"]["questions"] > 5
        results.run_all([job], workers=1)  # it is there: nothing to do
    assert not any((tmp_path / "results" / "runs").iterdir())

    class Killed(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if "stage2" in args.output_dir:
                raise KeyboardInterrupt

    train, settings_of = results.train, results.Job._settings
    for name in ("LinVT", "uniform pooling"):
        job = results.Job(BY_NAME[name], 1, tmp_path / "results", overrides)
        expected = json.loads(job.file.read_text())
        with monkeypatch.context() as patch:
            patch.setattr(results.Job, "_settings", lambda *a: dataclasses.replace(settings_of(*a), save_every=1))
            patch.setattr(results, "train", lambda *args, **kwargs: train(*args, **kwargs, callbacks=[Killed()]))
            with pytest.raises(KeyboardInterrupt):
                results.run(job)
        assert (tmp_path / "results/runs" / job.name / "stage2/checkpoint-1").is_dir()
        assert json.loads(json.dumps(results.run(job))) == expected
