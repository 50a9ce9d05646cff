"""Axes as they are written in a file of a space: what may stand there, and what it means.

A list is of values, each once. A mapping has `values`, or a range (`from`, `to`, `scale`, `points`
of a grid), and conditions: `when` and `unless` name earlier axes with values at which the axis has
an effect, or has none. `sources` has sets of teachers instead, `arm` patterns of names.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, get_type_hints

import numpy as np

from tmu_dist.config import ConfigError, RunConfig, flatten, identity
from tmu_dist.config.checks import nearest, require
from tmu_dist.ledger.arms import short_names
from tuning.refusals import as_type, naming, refuse_unknown
from tuning.space import ARM, SEED, SOURCES, Axis, Value, arms_of, rounded, show

MOST_SOURCES = 12
"""Whose sets can all be tried: 4,095."""

_RANGE = ("from", "to", "scale", "points")
_CONDITIONS = ("when", "unless")
_INSTEAD = {
    SEED: "seeds repeat every point: use --seeds, or `seeds` under `search`",
    "transfer.teachers": "use the axis `sources`",
    "data.url": "each archive needs a search of its own, as their errors do not compare",
    "data.mix_with": "vary the shares by `data.mix_weights`",
}
"""Of fields that are no axis: what is meant."""


def read_axes(config: RunConfig, written: Mapping[str, Any]) -> tuple[Axis, ...]:
    """All axes, the two that change what the others mean first."""
    _check_names(config, written)
    first = [name for name in (ARM, SOURCES) if name in written]
    axes: list[Axis] = []
    for name in [*first, *(other for other in written if other not in first)]:
        with naming(f"axis {name!r}"):
            axes.append(_read_axis(config, name, written[name], axes))
    return tuple(axes)


def _check_names(config: RunConfig, names: Iterable[Any]) -> None:
    fields = [path for path, _ in flatten(asdict(config))]
    shaping = identity(config).keys() - {SEED}
    for name in names:
        with naming(f"axis {name!r}"):
            inside = [path for path in fields if path.startswith(f"{name}.")]
            require(
                not inside,
                f"This is a section: name one of its fields, such as {''.join(inside[:1])}.",
            )
            require(
                name in (*fields, ARM, SOURCES),
                f"There is no such config field.{_nearest_field(str(name), fields)} Axes are "
                f"config fields by their whole paths, {ARM!r} and {SOURCES!r}.",
            )
            instead = _INSTEAD.get(
                name, "it says where or how runs are computed, not what they learn"
            )
            require(name in (*shaping, ARM, SOURCES), f"This is no axis: {instead}.")


def _read_axis(config: RunConfig, name: str, written: Any, earlier: Sequence[Axis]) -> Axis:
    usual = "sets" if name == SOURCES else "values"
    parts = dict(written) if isinstance(written, dict) else {usual: written}
    if name == SOURCES:
        allowed: tuple[str, ...] = (usual, "none", *_CONDITIONS)
    elif name == ARM:
        allowed = (usual,)
    else:
        allowed = (usual, *_CONDITIONS, *_RANGE)
    refuse_unknown("key", parts, allowed)
    when = _read_conditions(config, parts, earlier)
    if not parts.keys() & set(_RANGE):
        values = _read_sets(config, parts) if name == SOURCES else parts.get(usual)
        return Axis(name=name, values=_distinct(_read_values(config, name, values)), when=when)
    require(usual not in parts, "`values` and a range (`from`, `to`) exclude each other.")
    return _read_range(config, name, parts, when)


def _read_values(config: RunConfig, name: str, written: Any) -> tuple[Value, ...]:
    """The values that a list names, each once."""
    others = {ARM: "", SOURCES: "; or `all`"}.get(name, "; or a range, by `from` and `to`")
    require(
        isinstance(written, list) and len(written) > 0,
        f"Name one value at least, in a list{others}; got {written!r}.",
    )
    if name == ARM:
        return _matching(list(arms_of(config)), written)
    if name == SOURCES:
        teachers = _teachers(config)
        return tuple(dict.fromkeys(_as_set(teachers, names) for names in written))
    hint = _type_of(config, name)
    return tuple(as_type(hint, value, f"the value {value!r}") for value in written)


def _matching(names: Sequence[str], patterns: Sequence[Any]) -> tuple[Value, ...]:
    found: dict[str, None] = {}
    for pattern in patterns:
        matched = fnmatch.filter(names, str(pattern))
        require(
            len(matched) > 0,
            f"There is no arm {pattern!r}.{nearest(str(pattern), names)} Arms: {', '.join(names)}.",
        )
        found.update(dict.fromkeys(matched))
    return tuple(found)


def _read_sets(config: RunConfig, parts: Mapping[str, Any]) -> Any:
    """What stands under `sources` as a list of lists of names."""
    sets, with_none = parts.get("sets", []), parts.get("none", False)
    require(isinstance(with_none, bool), f"`none` must be true or false, got {with_none!r}.")
    if sets == "all":
        teachers = _teachers(config)
        require(
            len(teachers) <= MOST_SOURCES,
            f"All sets of {len(teachers)} teachers are too many to try (at most "
            f"{MOST_SOURCES} teachers): name sets.",
        )
        sizes = range(1, len(teachers) + 1)
        sets = [list(names) for size in sizes for names in combinations(teachers, size)]
    return [[], *sets] if with_none and isinstance(sets, list) else sets


def _teachers(config: RunConfig) -> tuple[str, ...]:
    require(
        config.transfer.method == "tmu",
        "Sets of sources are of memory transfer (transfer.method=tmu; recipes that end with "
        f"-tmu), not of {config.transfer.method}.",
    )
    return short_names(config.transfer.teachers)


def _as_set(teachers: Sequence[str], names: Any) -> tuple[str, ...]:
    """A set of teachers in their own order."""
    require(
        isinstance(names, list),
        f"A set is a list of teachers' names, such as [{teachers[0]}], or [] for training from "
        f"scratch, got {names!r}.",
    )
    wanted = [str(name) for name in names]
    for name in wanted:
        if name not in teachers:
            raise ConfigError(
                f"The run has no teacher {name!r}.{nearest(name, teachers)} Its teachers: "
                f"{', '.join(teachers)}."
            )
    return tuple(name for name in teachers if name in wanted)


def _distinct(values: tuple[Value, ...]) -> tuple[Value, ...]:
    """Refuse values that no table could tell apart."""
    shown: dict[str, Value] = {}
    for value in values:
        other = shown.setdefault(show(value), value)
        require(
            other is value,
            f"The values {other!r} and {value!r} are both shown as {show(value)}: leave one out.",
        )
    return values


def _read_range(
    config: RunConfig, name: str, parts: Mapping[str, Any], when: Mapping[str, tuple[Value, ...]]
) -> Axis:
    require({"from", "to"} <= parts.keys(), "A range needs `from` and `to`.")
    hint = _type_of(config, name)
    low, high = (as_type(hint, parts[end], f"`{end}`") for end in ("from", "to"))
    for end in (low, high):
        require(
            isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end),
            f"A range is between finite numbers, got {end!r}.",
        )
    require(low < high, f"`from` must be below `to`, got {low} and {high}.")
    scale, points = parts.get("scale", "linear"), parts.get("points")
    require(scale in ("linear", "log"), f"`scale` must be linear or log, got {scale!r}.")
    require(scale == "linear" or low > 0, f"`scale: log` needs a positive `from`, got {low}.")
    require(
        points is None or (type(points) is int and points >= 2),
        f"`points` of a grid must be a number from 2 on, got {points!r}.",
    )
    is_integer = isinstance(low, int) and isinstance(high, int)
    spaced = (np.geomspace if scale == "log" else np.linspace)(low, high, points or 2)
    inner = (round(x) if is_integer else rounded(x) for x in spaced[1:-1].tolist())
    return Axis(
        name=name,
        values=tuple(dict.fromkeys((low, *inner, high))) if points else (),
        low=low,
        high=high,
        is_log=scale == "log",
        is_integer=is_integer,
        when=when,
    )


def _read_conditions(
    config: RunConfig, parts: dict[str, Any], earlier: Sequence[Axis]
) -> dict[str, tuple[Value, ...]]:
    """Take `when` and `unless` out of an axis: both as values at which it has an effect."""
    found: dict[str, tuple[Value, ...]] = {}
    before = {axis.name: axis for axis in earlier}
    for word in _CONDITIONS:
        conditions = parts.pop(word, {})
        require(
            isinstance(conditions, dict),
            f"`{word}` names axes with values, such as {{arm: tmu}}, got {conditions!r}.",
        )
        for other, written in conditions.items():
            with naming(f"`{word}`"):
                require(
                    other in before,
                    f"{other!r} is none of the axes before this one: "
                    f"{', '.join(before) or 'there are none'}.{nearest(str(other), before)}",
                )
                require(other not in found, f"{other!r} is under `when` as well.")
                named = _named(config, before[other], written)
                found[other] = (
                    named
                    if word == "when"
                    else tuple(value for value in before[other].values if value not in named)
                )
                require(len(found[other]) > 0, f"{other!r} has no other values than these.")
    return found


def _named(config: RunConfig, axis: Axis, written: Any) -> tuple[Value, ...]:
    """Those of an axis' values that a condition names."""
    require(not axis.is_range, f"{axis.name!r} is a range: conditions are about single values.")
    several = written if isinstance(written, list) else [written]
    if axis.name == ARM:
        return _matching([str(value) for value in axis.values], several)
    named = _read_values(config, axis.name, several)
    for value in named:
        require(
            value in axis.values,
            f"{axis.name!r} is never {show(value)}, but {', '.join(map(show, axis.values))}.",
        )
    return named


def _nearest_field(name: str, fields: Sequence[str]) -> str:
    """By the whole path, or by its last part alone."""
    alike = [path for path in fields if path.rpartition(".")[2] == name]
    return nearest(name, fields) or (f" Did you mean {alike[0]!r}?" if alike else "")


def _type_of(config: RunConfig, path: str) -> Any:
    section: Any = config
    *parents, leaf = path.split(".")
    for parent in parents:
        section = getattr(section, parent)
    return get_type_hints(type(section))[leaf]
