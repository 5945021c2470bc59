"""Rules from a checkpoint's tensors to a model's: what they find, in which order, and what they say when it fails."""

import pytest
import torch

from linvt_hf.conversion.rules import Drop, Rule, cut, join, make_plan

SOURCES = {
    "blocks.0.qkv.weight": (12, 4),
    "blocks.1.qkv.weight": (12, 4),
    "head.a": (2, 4),
    "head.b": (3, 4),
    "rest.x": (1,),
}
TARGETS = {
    **{f"layers.{n}.{part}.weight": (4, 4) for n in range(2) for part in "qkv"},
    "head.weight": (5, 4),
}
RULES = (
    Rule("blocks.{n}.qkv.{kind}", tuple(f"layers.{{n}}.{part}.{{kind}}" for part in "qkv"), cut(4, 4, 4)),
    Rule(("head.a", "head.b"), "head.weight", join),
    Drop("rest.{rest*}", "nobody reads it"),
)


def test_every_tensor_finds_its_place():
    plan = make_plan(RULES, SOURCES, TARGETS)
    assert [step.targets for step in plan.steps] == [
        *(tuple(f"layers.{n}.{part}.weight" for part in "qkv") for n in range(2)),
        ("head.weight",),
    ]
    assert plan.dropped == {"rest.x": "nobody reads it"}
    fused = torch.arange(48.0).view(12, 4)
    made = plan.steps[0].run([fused])
    assert torch.equal(made["layers.0.k.weight"], fused[4:8])
    assert "blocks.1.qkv.weight -> layers.1.q.weight, layers.1.k.weight, layers.1.v.weight" in str(plan)
    assert "rest.x is dropped: nobody reads it" in str(plan)


def test_numbers_that_no_target_names_make_one_step_in_their_order():
    def stack(*tensors):
        half = len(tensors) // 2
        return torch.stack([torch.cat(pair) for pair in zip(tensors[:half], tensors[half:], strict=True)])

    sources = {f"experts.{n}.{part}": (2, 3) for n in (10, 2, 0, 1, 9, 3, 4, 5, 6, 7, 8) for part in ("up", "gate")}
    plan = make_plan([Rule(("experts.{n}.gate", "experts.{n}.up"), "all", stack)], sources, {"all": (11, 4, 3)})
    gates, ups = plan.steps[0].sources[:11], plan.steps[0].sources[11:]
    assert gates == tuple(f"experts.{n}.gate" for n in range(11))
    assert ups == tuple(f"experts.{n}.up" for n in range(11))


def changed(mapping, **changes):
    renamed = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: shape for name, shape in {**mapping, **renamed}.items() if shape is not None}


@pytest.mark.parametrize(
    ("sources", "targets", "said"),
    [
        ({"stray__weight": (3,)}, {}, r"1 tensor \(stray\.weight\) for which this base has no rule"),
        ({"blocks__1__qkv__weight": None}, {}, r"3 tensors \(layers\.1\.q\.weight, .*\) of the model"),
        ({"head__b": None}, {}, r"head\.weight cannot be made: of head\.b there are only 0 tensors"),
        (
            {"blocks__0__qkv__weight": (12, 5)},
            {},
            r"blocks\.0\.qkv\.weight of shape \[12, 5\] would give .*\[4, 5\].*\[4, 4\]",
        ),
        (
            {"blocks__0__qkv__weight": (13, 4)},
            {},
            r"blocks\.0\.qkv\.weight -> .* does not work with shapes \[\(13, 4\)\]",
        ),
        (
            {"blocks__7__qkv__weight": (12, 4)},
            {},
            r"blocks\.7\.qkv\.weight would become layers\.7\.q\.weight, which the",
        ),
        ({}, {"norm__weight": (4,)}, r"Nothing in the checkpoint makes 1 tensor \(norm\.weight\) of the model"),
    ],
    ids=["unexpected", "missing", "half", "misshapen", "not to be cut", "too many layers", "nothing makes it"],
)
def test_what_does_not_fit_is_named(sources, targets, said):
    with pytest.raises(ValueError, match=said):
        make_plan(RULES, changed(SOURCES, **sources), changed(TARGETS, **targets))
