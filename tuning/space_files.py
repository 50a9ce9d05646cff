"""Spaces as YAML files, and everything that can be wrong with one, said before anything starts.

    about: one line
    recipe: digits-tmu                    default of --recipe
    search: {sampler: grid, seeds: [0]}   defaults of a search's options (`plan.SearchConfig`)
    settings: {training.num_steps: 120}   of every trial, by the paths of the command line
    axes:                                 what is varied
      arm: [scratch, finetune-*, tmu]     methods by the ledger's names, and patterns of them
      sources: {sets: all, when: {arm: tmu}}
      transfer.beta: {from: 0.001, to: 1, scale: log, points: 4, when: {arm: tmu}}
      data.fraction: [0.5, 1]

docs/searches.md has the whole grammar. Deliberately not here: what a space is (`space`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from tmu_dist.config import ConfigError, RunConfig, flatten, identity, with_overrides
from tmu_dist.config.checks import nearest, require
from tmu_dist.data.order import count_of_fraction
from tmu_dist.recipes import DEFAULT_RECIPE, get_recipe
from tuning.axes import read_axes
from tuning.plan import SearchConfig
from tuning.refusals import as_type, naming, refuse_unknown
from tuning.space import FRACTION, SEED, Point, Space, run_of

BUILT_IN = Path(__file__).parent / "spaces"
MOST_POINTS = 300
"""Whose runs are built before anything starts; a large space is probed."""

_KEYS = ("about", "recipe", "search", "settings", "axes")
_OF_THE_COMMAND = ("output", SEED, "data.url", "data.mix_with", "transfer.teachers")
"""No settings of a space: the trial's own, or addresses that mean what the recipe says."""


@dataclass(frozen=True, kw_only=True)
class SpaceFile:
    """A space as it is written; what its axes mean depends on the run (`make_space`)."""

    name: str
    origin: str
    """How it was asked for; errors begin with it."""
    about: str
    recipe: str
    search: Mapping[str, Any]
    """Fields of `SearchConfig` that it sets, checked one by one."""
    settings: Mapping[str, Any]
    """By dotted path."""
    axes: Mapping[str, Any]
    """As written."""


def read_space_file(name_or_path: str) -> SpaceFile:
    """Read a built-in space by name, or a file.

    Raises:
        ConfigError: there is none, or a part is unknown or of the wrong type.
    """
    path = _find(name_or_path)
    with naming(name_or_path):
        tree = _load(path)
        refuse_unknown("key", tree, _KEYS)
        for key in ("search", "settings", "axes"):
            require(
                isinstance(tree.get(key, {}), dict),
                f"`{key}` must hold named values, got {tree.get(key)!r}.",
            )
        for key in ("about", "recipe"):
            require(
                isinstance(tree.get(key, ""), str), f"`{key}` must be words, got {tree.get(key)}."
            )
        require(bool(tree.get("axes")), "`axes` is missing or empty: name what is varied.")
        recipe = tree.get("recipe", DEFAULT_RECIPE)
        get_recipe(recipe)
        return SpaceFile(
            name=path.stem,
            origin=name_or_path,
            about=tree.get("about", ""),
            recipe=recipe,
            search=_read_options(tree.get("search", {})),
            settings=_read_settings(tree.get("settings", {})),
            axes=tree["axes"],
        )


def make_space(file: SpaceFile, base: RunConfig) -> Space:
    """The space over a run: every field, value and combination is checked.

    Args:
        file: what to vary.
        base: the run before anything is varied.

    Raises:
        ConfigError: says which axis or field cannot be as it is written, and what would do.
    """
    with naming(file.origin):
        for path in _OF_THE_COMMAND:
            require(
                path not in file.settings,
                f"settings: {path} is not for a space to say: name it on the command line"
                + (", by --seeds." if path == SEED else "."),
            )
        twice = sorted(file.settings.keys() & file.axes.keys())
        require(not twice, f"{', '.join(twice)} is both under `settings` and under `axes`.")
        with naming("settings"):
            config = with_overrides(base, file.settings)
        space = Space(name=file.name, axes=read_axes(config, file.axes), settings=file.settings)
        _check_points(space, base)
        return space


def check_fractions(
    space: Space, fractions: Sequence[float], *, num_train_samples: int, full: int | None
) -> None:
    """Check that the target's archive has as much data as a search asks for.

    Args:
        space: its axis or setting `data.fraction` is checked.
        fractions: of the target data, where they are the fidelity; else empty.
        num_train_samples: of the archive.
        full: how many of them count as 100 % (its manifest's `full_train_samples`).

    Raises:
        ConfigError: there are fewer samples, or fractions are said twice.
    """
    asked: list[Any]
    axis = space.axis(FRACTION)
    if axis is not None:
        name, asked = f"{space.name}: axis {FRACTION!r}", [*axis.values, axis.high]
    else:
        name, asked = f"{space.name}: settings: {FRACTION}", [space.settings.get(FRACTION)]
    asked = [fraction for fraction in asked if fraction is not None]
    require(
        not (asked and fractions),
        f"{name} and --fractions {fractions} are about the same: use one of them.",
    )
    for where, found in ((name, asked), (f"--fractions ({FRACTION})", fractions)):
        for fraction in found:
            try:
                count_of_fraction(num_train_samples, fraction, full)
            except ValueError as error:
                raise ConfigError(
                    f"{where}: {error} The recipes digits-fractions and paper-digits-fractions "
                    "make such archives."
                ) from None


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    require(
        not path.suffix and len(path.parts) == 1,
        f"The space file {name_or_path!r} does not exist.",
    )
    there = _built_in()
    require(
        name_or_path in there,
        f"Unknown space {name_or_path!r}.{nearest(name_or_path, there)} A space is a YAML file, or "
        f"one of:{overview()}",
    )
    return there[name_or_path]


def overview() -> str:
    """The spaces that are known by name, a line each."""
    return "".join(f"\n  {name}: {_load(file)['about']}" for name, file in _built_in().items())


def _built_in() -> dict[str, Path]:
    return {file.stem: file for file in sorted(BUILT_IN.glob("*.yaml"))}


class _Loader(yaml.SafeLoader):
    """Plain values only; a name that is there twice is refused, where YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            require(names.count(name) == 1, f"{name!r} is there twice.")
        return super().construct_mapping(node, deep)


def _load(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"This is not valid YAML: {error}") from None
    require(isinstance(tree, dict), f"A space file has named parts ({', '.join(_KEYS)}).")
    return tree


def _read_settings(written: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in flatten(written):
        require(name not in found, f"settings: {name} is there twice.")
        found[name] = value
    return found


def _read_options(written: Mapping[str, Any]) -> dict[str, Any]:
    with naming("search"):
        hints = get_type_hints(SearchConfig)
        refuse_unknown("option", written, hints)
        return {name: as_type(hints[name], value, name) for name, value in written.items()}


def _check_points(space: Space, base: RunConfig) -> None:
    """Build the runs of a space, all of a small grid: settings may contradict each other."""
    first: dict[tuple[object, ...], Point] = {}
    active: set[str] = set()
    for point in _points_to_try(space):
        try:
            config = run_of(base, space, point, 0)
        except ConfigError as error:
            hint = _hint(space, base, point)
            raise ConfigError(f"at {space.label(point)}: {error}{hint}") from None
        addresses = (config.data.url, config.data.mix_with, config.transfer.teachers)
        other = first.setdefault((*identity(config).items(), *addresses), point)
        require(
            other == point,
            f"{space.label(other)} and {space.label(point)} are the same run: leave one out.",
        )
        active |= point.keys()
    for axis in space.axes:
        require(axis.name in active, f"axis {axis.name!r}: its conditions never hold together.")


def _points_to_try(space: Space) -> list[Point]:
    if all(axis.values for axis in space.axes):
        grid = list(islice(space.grid(), MOST_POINTS + 1))
        if len(grid) <= MOST_POINTS:
            return grid
    ends = list(islice(space.ends(), MOST_POINTS))
    return [*ends, *(space.draw(0, number) for number in range(MOST_POINTS))]


def _hint(space: Space, base: RunConfig, point: Point) -> str:
    """How to leave out an axis that contradicts an earlier one at a point; empty if none does."""

    def runs(part: Point) -> bool:
        try:
            run_of(base, space, part, 0)
        except ConfigError:
            return False
        return True

    names = list(point)
    last = next(n for n in range(len(names)) if not runs({k: point[k] for k in names[: n + 1]}))
    for axis in (space.axis(name) for name in names[:last]):
        if axis is not None and not axis.is_range:
            rest = {k: point[k] for k in names[: last + 1] if k != axis.name}
            if runs(rest):
                value = json.dumps([point[axis.name]]).replace('"', "")
                return (
                    f" If axis {names[last]!r} has no effect there, say so by `when` or `unless`, "
                    f"such as `unless: {{{axis.name}: {value}}}`."
                )
    return ""
