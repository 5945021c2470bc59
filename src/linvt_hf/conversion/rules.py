"""
Rules that say how the tensors of an original checkpoint become those of a model; each base has a table of them.

A name in a rule may hold fields: `{n}` stands for one part between dots, `{rest*}` for any number of parts. Sources
whose fields agree in all that the targets name make one step together; of other fields, such as an expert's number,
all values do, in their order.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Shape = tuple[int, ...]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Rule:
    """
    Some tensors of the checkpoint make some of the model.

    Args:
        sources, targets: names, one or several.
        make: from the sources' tensors, in the order of `sources`, to the targets', one or a tuple.
    """

    sources: str | tuple[str, ...]
    targets: str | tuple[str, ...]
    make: Callable[..., Tensor | tuple[Tensor, ...]] = _as_it_is

    @cached_property
    def patterns(self) -> list[re.Pattern]:
        return [_pattern(source) for source in _several(self.sources)]


@dataclass(frozen=True)
class Drop:
    """Tensors of the checkpoint that the model has no use for, and why."""

    source: str
    why: str

    @cached_property
    def patterns(self) -> list[re.Pattern]:
        return [_pattern(self.source)]


@dataclass(frozen=True)
class Step:
    """What one rule does to the tensors of one layer."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    make: Callable[..., Tensor | tuple[Tensor, ...]]

    def run(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        made = self.make(*tensors)
        return dict(zip(self.targets, (made,) if isinstance(made, Tensor) else made, strict=True))

    def __str__(self) -> str:
        sources = self.sources if len(self.sources) <= 4 else (*self.sources[:2], "...", self.sources[-1])
        return f"{', '.join(sources)} -> {', '.join(self.targets)}"


@dataclass(frozen=True)
class Plan:
    """All steps from a checkpoint to a model, in the order of the model's tensors, and what is dropped."""

    steps: list[Step]
    dropped: dict[str, str]
    shapes: dict[str, Shape]  # of the model's tensors

    def __str__(self) -> str:
        lines = [f"{step}  {[list(self.shapes[target]) for target in step.targets]}" for step in self.steps]
        return "\n".join([*lines, *(f"{name} is dropped: {why}" for name, why in self.dropped.items())])


def make_plan(rules: Iterable[Rule | Drop], sources: dict[str, Shape], targets: dict[str, Shape]) -> Plan:
    """
    Finds the rule of every tensor, the first that fits, and tries all steps on shapes alone.

    Raises `ValueError` naming the tensors for which there is no rule, that are missing, or that have another shape.
    """
    rules = list(rules)
    groups: dict[tuple, list[tuple]] = {}
    dropped, unexpected = {}, []
    for name in sources:
        for index, rule in enumerate(rules):
            if found := _first_match(rule.patterns, name):
                if isinstance(rule, Drop):
                    dropped[name] = rule.why
                else:
                    place, fields = found
                    made = tuple(target.format_map(fields) for target in _several(rule.targets))
                    groups.setdefault((index, made), []).append((place, _in_order(fields), name))
                break
        else:
            unexpected.append(name)
    if unexpected:
        raise ValueError(f"The checkpoint holds {_named(unexpected, 'tensor')} for which this base has no rule.")

    steps = []
    for (index, made), members in groups.items():
        rule = rules[index]
        counts = [sum(place == wanted for place, _, _ in members) for wanted in range(len(rule.patterns))]
        if len(set(counts)) > 1:
            absent = [
                source for source, count in zip(_several(rule.sources), counts, strict=True) if count == min(counts)
            ]
            raise ValueError(f"{made[0]} cannot be made: of {', '.join(absent)} there are only {min(counts)} tensors.")
        steps.append(Step(tuple(name for _, _, name in sorted(members)), made, rule.make))
    _check_shapes(steps, sources, targets)
    order = {name: place for place, name in enumerate(targets)}
    return Plan(sorted(steps, key=lambda step: order[step.targets[0]]), dropped, targets)


def _check_shapes(steps: list[Step], sources: dict[str, Shape], targets: dict[str, Shape]) -> None:
    made: dict[str, Shape] = {}
    for step in steps:
        shapes = [sources[name] for name in step.sources]
        try:
            result = step.run(torch.empty(shape, device="meta") for shape in shapes)
        except (RuntimeError, ValueError, IndexError) as error:  # torch's words say little about which tensor it was
            raise ValueError(
                f"{step} does not work with shapes {shapes}; is this checkpoint of another model?"
            ) from error
        for name, tensor in result.items():
            if name not in targets:
                raise ValueError(f"{step.sources[0]} would become {name}, which the model does not have.")
            if tensor.shape != targets[name]:
                raise ValueError(
                    f"{', '.join(step.sources[:2])} of shape {list(shapes[0])} would give {name} the shape "
                    f"{list(tensor.shape)}, but the model's has {list(targets[name])}."
                )
            if name in made:
                raise ValueError(f"{name} would be made twice, the second time from {step.sources[0]}.")
            made[name] = targets[name]
    if missing := [name for name in targets if name not in made]:
        raise ValueError(f"Nothing in the checkpoint makes {_named(missing, 'tensor')} of the model.")


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _pattern(name: str) -> re.Pattern:
    parts = re.split(r"\{(\w+\*?)\}", name)
    fields = [f"(?P<{f.removesuffix('*')}>{'.+' if f.endswith('*') else '[^.]+'})" for f in parts[1::2]]
    texts = [re.escape(text) for text in parts[::2]]
    return re.compile("".join(text + field for text, field in zip(texts, [*fields, ""], strict=True)))


def _first_match(patterns: list[re.Pattern], name: str) -> tuple[int, dict[str, str]] | None:
    for place, pattern in enumerate(patterns):
        if match := pattern.fullmatch(name):
            fields = match.groupdict()
            return place, {**fields, **{f"{field}*": value for field, value in fields.items()}}
    return None


def _in_order(fields: dict[str, str]) -> list[tuple]:
    """Numbers by their value, and before words."""
    return [(0, int(value), "") if value.isdigit() else (1, 0, value) for value in fields.values()]


def _named(names: list[str], what: str, most: int = 5) -> str:
    listed = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({listed})"


# ---- what rules do, beside handing a tensor on ----


def cut(*sizes: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Rows of one tensor to several, `sizes` rows each."""
    return lambda tensor: tensor.split(sizes)


def join(*tensors: Tensor) -> Tensor:
    """Rows of several tensors to one."""
    return torch.cat(tensors)
