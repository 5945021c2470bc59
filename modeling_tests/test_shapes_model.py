"""The small image-LLM of `shapes`: how its training data is made, and that it learns."""

import itertools
import math
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import chat, encode

from linvt_hf import wrap
from linvt_hf.shapes import image_llm, samples
from linvt_hf.shapes.bases import BASES, INTERNVL2
from linvt_hf.shapes.questions import PLACES, RANKS, ask, ask_about_pictures, place_name
from linvt_hf.shapes.results import bases_table
from linvt_hf.shapes.rows import EACH_BASE
from linvt_hf.shapes.world import COLOURS, SHAPES, make_scene


@pytest.fixture(scope="module")
def tokenizer():
    return image_llm.build_tokenizer()


def test_every_answer_about_time_is_one_token(tokenizer):
    for number in range(100):
        for question in ask(make_scene("video", "test", number), Random(number)):
            for option in question.options:
                assert len(tokenizer(option, add_special_tokens=False)["input_ids"]) == 1, option


def test_the_tokenizer_reads_any_text_and_is_the_same_every_time(tokenizer):
    text = "Größe? 视频 <3"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert image_llm.build_tokenizer().get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) < image_llm.VOCABULARY  # room for the video token


def test_a_sample_learns_answers_only(tokenizer):
    for number in range(30):
        scene = make_scene("image", "train", number)
        random = Random(number)
        sample = samples.pictures_sample(scene, random, tokenizer, albums=0.5)
        assert len(sample.ids) == len(sample.labels) == len(sample.block)
        learned = tokenizer.decode([label for label in sample.labels if label >= 0]).split("<|im_end|>")
        # What is shown is drawn first, so it can be drawn again.
        random = Random(number)
        pictures = (samples.layered if random.random() >= 0.5 else samples.album)(scene, random)
        assert len(sample.pixels) == len(pictures)
        possible = {question.answer for question in ask(scene, Random(0)) + ask_about_pictures(pictures, Random(0))}
        assert learned.pop() == "" and set(learned) <= possible
        places = sample.ids.count(tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
        assert places == image_llm.SIDE**2 * len(sample.pixels)
        assert sample.contents.shape[:2] == (len(sample.pixels), image_llm.SIDE**2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_question_sees_the_pictures_and_itself_only(tokenizer, attention):
    """Several questions in one prompt get the logits that each gets alone."""
    model = INTERNVL2.build(tokenizer).eval()
    model.set_attn_implementation(attention)
    scene = make_scene("image", "train", 1)
    questions = ask(scene, Random(1))

    def logits(asked):
        sample = samples.of_pictures([samples.draw(scene, 0)], [scene], tokenizer)
        samples.ask_about(sample, asked, tokenizer)
        inputs, _ = image_llm.collate([sample], model)
        learned = torch.tensor(sample.labels) >= 0
        return model(**inputs).logits[0, : len(learned)][learned]

    with torch.no_grad():
        together, apart = logits(questions), torch.cat([logits([question]) for question in questions])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_answers_are_counted_where_they_stand(tokenizer):
    """A model that says the same after everything is right exactly where that is the answer."""

    class Parrot(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.config, self.get_input_embeddings = model.config, model.get_input_embeddings
            self.device = model.device
            self.get_image_features = model.get_image_features

        def forward(self, inputs_embeds, **_):
            ids = torch.tensor(tokenizer("still<|im_end|>")["input_ids"])
            logits = torch.zeros(1, inputs_embeds.shape[1], image_llm.VOCABULARY)
            said = (inputs_embeds[0] == self.get_input_embeddings().weight[ids[0]]).all(dim=-1)
            logits[0, torch.arange(len(said)), torch.where(said, ids[1], ids[0])] = 1.0
            return type("Output", (), {"logits": logits})

    scores = image_llm.evaluate(Parrot(INTERNVL2.build(tokenizer).eval()), tokenizer, scenes=20)
    answers = []
    for number in range(20):
        random = Random(number)
        scene = make_scene("image", "validation", number)
        pictures = samples.album(scene, random)
        ask(scene, random)
        answers += [q.answer for q in ask_about_pictures(pictures, random) if q.kind == "motion"]
    assert scores["motion"] == round(answers.count("still") / len(answers), 3) > 0
    assert scores["place"] == scores["description"] == 0


def test_every_thing_is_in_one_of_a_prompts_pictures():
    counts = set()
    for number in range(60):
        scene = make_scene("image", "train", number)
        layers = samples.layered(scene, Random(number))
        counts.add(len(layers))
        assert {thing for layer in layers for thing in layer.things} == set(scene.things)
    assert counts == {1, 2, 3, 4}


def test_contents_say_what_lies_where():
    scene = make_scene("image", "train", 3)
    contents = samples.contents(scene).reshape(image_llm.SIDE, image_llm.SIDE, -1)
    kinds, colours, shapes, places = 48, len(COLOURS), len(SHAPES), len(PLACES)
    assert contents.shape[2] == kinds + colours + shapes + places
    for thing in scene.things:
        column, row = (int(value // (64 / image_llm.SIDE)) for value in thing.start)
        here = contents[row, column]
        assert here[list(COLOURS).index(thing.colour) * shapes + SHAPES.index(thing.shape)] == 1
        assert here[kinds + list(COLOURS).index(thing.colour)] == 1
        assert here[kinds + colours + SHAPES.index(thing.shape)] == 1
        assert here[kinds + colours + shapes + PLACES.index(place_name(thing.start))] == 1


def test_it_learns_from_a_seed_and_can_be_wrapped(tmp_path, monkeypatch):
    said: list[str] = []
    model, tokenizer = image_llm.pretrain(INTERNVL2, 3, 3, batch=4, log=said.append)
    drawn = image_llm._drawn
    monkeypatch.setattr(image_llm, "_drawn", lambda batches, _: drawn(batches, True))  # as on a GPU
    again, _ = image_llm.pretrain(INTERNVL2, 3, 3, batch=4, log=lambda text: None)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert sum(p.numel() for p in model.parameters()) < 2e6
    image_llm.save(model, tokenizer, tmp_path)
    wrapped, processor = wrap(tmp_path, num_frames=4, queries_per_scale=[4, 2, 2], bottleneck_size=16, num_heads=2)
    assert processor.num_video_tokens == 8 and wrapped.config.hidden_size == 128
    inputs = processor.image_processor([[Image.new("RGB", (64, 64))]], return_tensors="pt")
    assert len(wrapped.get_image_features(inputs["pixel_values"]).pooler_output[0]) == image_llm.SIDE**2


@pytest.mark.parametrize("spread", [samples.layered, samples.album])
def test_questions_about_several_pictures_are_answered_from_them(spread):
    kinds = set()
    for number in range(60):
        pictures = spread(make_scene("image", "train", number), Random(number))
        if len(pictures) == 1:
            continue
        shown = [{thing.shape: thing for thing in picture.things} for picture in pictures]
        for question in ask_about_pictures(pictures, Random(number)):
            kinds.add(question.kind)
            rank = next((rank for rank in RANKS if rank in question.text or rank == question.answer), "first")
            here = shown[RANKS.index(rank)]
            shape = next((shape for shape in SHAPES if shape in question.text), None)
            match question.kind:
                case "picture":
                    assert [shape in things for things in shown].count(True) == 1 and shape in here
                case "place in one":
                    assert question.answer == place_name(here[shape].start)
                case "colour in one":
                    assert question.answer == here[shape].colour
                case "motion":
                    assert (question.answer == "still") == (len({s[shape].start for s in shown if shape in s}) == 1)
                case "direction":
                    (x, y), *_, (to_x, to_y) = [things[shape].start for things in shown if shape in things]
                    right, down = to_x - x, to_y - y
                    ways = {"right": right, "left": -right, "down": down, "up": -down}
                    if question.answer == "nowhere":
                        assert right == down == 0
                    else:
                        assert ways[question.answer] >= 2 * min(abs(right), abs(down)) and ways[question.answer] > 0
                case "shapes in all":
                    assert int(question.answer) == len({shape for things in shown for shape in things})
                case "one of several":
                    things = pictures[RANKS.index(rank)].things
                    assert question.answer.count(" at the ") == len(things)
                    assert all(thing.name in question.answer for thing in things)
    always = {"picture", "place in one", "colour in one", "shapes in all", "one of several"}
    assert kinds == always | {"motion", "direction"}


def test_an_album_shows_each_shape_once_a_picture_and_nothing_overlaps():
    changed = set()
    for number in range(60):
        pictures = samples.album(make_scene("image", "train", number), Random(number))
        assert 2 <= len(pictures) <= 4
        for picture in pictures:
            assert len({thing.shape for thing in picture.things}) == len(picture.things)
            for i, one in enumerate(picture.things):
                for other in picture.things[:i]:
                    assert math.dist(one.start, other.start) > one.radius + other.radius
        seen = [{thing.shape: thing for thing in picture.things} for picture in pictures]
        for first, second in itertools.combinations(seen, 2):
            for shape in set(first) & set(second):
                one, other = first[shape], second[shape]
                assert one.start == other.start or math.dist(one.start, other.start) >= 0.3 * 64
                changed.add((one.start != other.start, one.colour != other.colour))
    assert len(changed) == 4


def test_a_story_tells_what_is_asked_and_is_learned_itself(tokenizer):
    scene = make_scene("video", "train", 4)
    sample = samples.story_sample(scene, Random(0), tokenizer)
    assert len(sample.pixels) == 0 and sample.ids.count(tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")) == 0
    learned = [(label, block) for label, block in zip(sample.labels, sample.block, strict=True) if label >= 0]
    told = tokenizer.decode([label for label, block in learned if block == 0])
    answers = tokenizer.decode([label for label, block in learned if block > 0]).split("<|im_end|>")
    possible = {question.answer for question in ask(scene, Random(0))}
    assert told.endswith("\n") and told[:-1] in possible
    assert answers.pop() == "" and set(answers) <= possible


@pytest.mark.parametrize("name", BASES)
def test_each_of_the_six_sees_a_frame_of_a_video_as_it_learned_pictures(name, tmp_path):
    base = BASES[name]
    tokenizer = image_llm.build_tokenizer(base)
    torch.manual_seed(0)
    model = base.build(tokenizer).eval()
    image_llm.save(model, tokenizer, tmp_path, base)
    scenes = [make_scene("image", "train", number) for number in range(3)]
    drawn = [samples.draw(scene, 0) for scene in scenes]
    sample = samples.of_pictures(drawn, scenes, tokenizer, base)
    inputs, tokens = image_llm.collate([sample], model, base)
    assert tokens.shape == (3, 16, 128) and inputs["inputs_embeds"].shape[0] == 1

    wrapped, processor = wrap(tmp_path, num_frames=3, bottleneck_size=16, num_heads=2)
    video = chat(np.stack(drawn), "Who?")
    given = wrapped.take_video_inputs(dict(encode(processor, video)))
    others = {key.removeprefix("frames_"): value for key, value in given.items() if key.startswith("frames_")}
    frames = wrapped.image_llm.encode_frames(wrapped.base, given["pixel_values_videos"], others, 3, 2)
    torch.testing.assert_close(torch.stack(list(frames)), tokens, atol=1e-5, rtol=1e-4)
    # And it stands in the prompt where pictures stood.
    prompt = processor.apply_chat_template(video, add_generation_prompt=True)
    assert prompt.startswith(f"<|im_start|>user\n{base.before}{processor.video_token}{base.after}")


def test_an_encoder_whose_projector_keeps_no_grid_is_taught_first():
    base, said = BASES["blip3"], []
    model, tokenizer = image_llm.pretrain(base, 10, 1, batch=2, log=said.append)
    assert [line.split(":")[0] for line in said[1:]] == ["encoder step 3/3", "vision step 7/7", "all step 1/1"]
    pixels = torch.rand(1, 3, 64, 64)
    changed = pixels.clone()
    changed[:, :, 16:32, 48:] = 1.0  # the part in the second row and the last column
    with torch.no_grad():
        embed = model.model.vision_tower.embeddings
        model.model.vision_tower.encoder.layers = torch.nn.ModuleList()  # so that no part sees another
        difference = base.encoder(model, pixels) - base.encoder(model, changed)
    assert embed.num_patches == 64 and difference.abs().sum(dim=-1).nonzero().tolist() == [[0, 7]]


def test_one_table_of_several_bases():
    results = [{"trained": {"video": {"exact": share}}} for share in (0.5, 0.75)]
    found = {row.name: [results[0]] for row in EACH_BASE}
    found["LinVT"] = results
    lines = bases_table({"molmo": found, "blip3": {**found, "LinVT": []}}).splitlines()
    assert lines[0] == "| | one middle frame | uniform pooling | all frames' tokens | LinVT |"
    assert lines[2:] == ["| molmo | 50.0 | 50.0 | 50.0 | 62.5 ± 17.7 |", "| blip3 | 50.0 | 50.0 | 50.0 |  |"]
