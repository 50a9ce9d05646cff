"""What a study is: rows, which are runs; claims, which are about rows; and two scales.

A row is a recipe with a few other settings. Both scales are the same rows: `paper-` recipes have
the paper's sizes, `study-` recipes smaller ones.

Deliberately not here: which studies there are (`studies`), running them (`runs`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from tmu_dist.config import ConfigError, RunConfig, flatten, identity, with_overrides
from tmu_dist.recipes import get_recipe
from tmu_dist.recipes.base import Recipe

if TYPE_CHECKING:
    from tmu_dist.ledger.records import Weights

PAGE_FILE, TABLE_FILE, RESULTS_FILE = "report.html", "table.md", "results.json"
"""What a study writes into its folder."""
MSE, MAE, SSIM, CSI, GATE = "mse_per_frame", "mae_per_frame", "ssim", "csi", "gate"
"""Scores by name; `gate` is the mean transfer gate of one teacher."""
ONE_SET_OF_TEACHERS = (
    "Teachers are trained once; seeds are those of the students. The paper runs everything three "
    "times, and does not say whether teachers, too."
)

Scale: TypeAlias = Literal["small", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)
_PREFIX: Mapping[Scale, str] = {"small": "study", "paper": "paper"}
_READ = ("data.url", "data.mix_with", "transfer.teachers")
"""Settings that name what a run reads."""
_MOST_LETTERS = 60
"""Of one changed setting in the name of a folder."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table, or one point of a figure."""

    key: str
    """Unique in its study; of several groups GROUP/NAME."""
    label: str
    sources: str = "none"
    """In words."""
    recipe: str
    """Without the scale's prefix: "digits-tmu"."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Changes of it; a value that is a function is given the config with what all rows have."""
    published: Mapping[str, float] = field(default_factory=dict)
    """The paper's values, by score."""
    group: str = ""
    """Rows of one group are compared with its reference: those of one backbone, say."""
    gate_of: str | None = None
    """The row is about one teacher of its run: the name of the source."""
    x: float | None = None
    """Where it stands on the axis of a figure; None: a reference, drawn along all of it."""

    def recipe_name(self, scale: Scale) -> str:
        """The whole name of its recipe."""
        return f"{_PREFIX[scale]}-{self.recipe}"

    def recipe_at(
        self, scale: Scale, for_all: Callable[[RunConfig], RunConfig] = lambda config: config
    ) -> Recipe:
        """The run, and how to make what it needs.

        Args:
            scale: whose recipe.
            for_all: changes that all rows have, on which the row's own are built.

        Raises:
            ConfigError: the recipe refuses the changes, or all rows would have what this one is
                about.
        """
        recipe = get_recipe(self.recipe_name(scale))
        config = for_all(recipe.config)
        changed = changes_of(recipe.config, config)
        if taken := [name for name in self.settings if name in changed]:
            raise ConfigError(
                f"{', '.join(taken)}: what row {self.key!r} is about cannot be set for all rows. "
                f"Leave it out, or train with it by `python -m tmu_dist.train --recipe "
                f"{self.recipe_name(scale)}`."
            )
        changes = {
            name: value(config) if callable(value) else value
            for name, value in self.settings.items()
        }
        return replace(recipe, config=with_overrides(config, changes))

    def run_name(self, config: RunConfig) -> str:
        """What its runs are called in every study: by family, network and method."""
        family = self.recipe.partition("-")[0]
        cell = "" if config.model.cell == "convlstm" else f"-{config.model.cell}"
        return f"{family}{cell}-{config.transfer.method.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that the paper says of rows, as far as runs can tell."""

    key: str
    text: str
    where: str
    """In the paper; "ours" for questions that the paper does not ask."""
    pairs: tuple[tuple[str, str], ...]
    """Rows: the first is better than the second. All of them must hold."""
    scores: tuple[str, ...] = ()
    """By which the pairs are compared; empty: by the study's first."""
    alike_within: float | None = None
    """The claim is that the rows of a pair differ by less than this part of the second's score."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Of a figure: what changes from run to run."""

    label: str
    is_log: bool = False


@dataclass(frozen=True, kw_only=True)
class Study:
    """One table or figure of the paper."""

    name: str
    title: str
    question: str
    scores: tuple[str, ...]
    """In the order of the table; the first decides where a claim names none."""
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    notes: Mapping[Scale, tuple[str, ...]]
    """In what each scale is not the paper's experiment."""
    reference: str = "scratch"
    """Last part of the key of the row that others are set in relation to; "" for none."""
    axis: Axis | None = None
    samples: Mapping[Scale, int | None] = field(default_factory=dict)
    """Forecasts of each sequence by stochastic networks; missing: as many as usual."""
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The paper's numbers of weights and times, by row."""

    def row(self, key: str) -> Row:
        """A row by its key."""
        return next(row for row in self.rows if row.key == key)

    @property
    def groups(self) -> tuple[str, ...]:
        """In the order of the rows."""
        return tuple(dict.fromkeys(row.group for row in self.rows))

    def rows_of(self, group: str) -> tuple[Row, ...]:
        """The rows of one group."""
        return tuple(row for row in self.rows if row.group == group)

    def reference_of(self, group: str) -> Row | None:
        """The row that the others of a group are set in relation to."""
        wanted = f"{group}/{self.reference}" if group else self.reference
        return next((row for row in self.rows if row.key == wanted), None)


def settings_for_all(study: Study, scale: Scale, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """What shapes results and was changed in every row that did not have it, by name.

    Args:
        study: whose rows.
        scale: whose recipes these were.
        recipes: of the rows, as they are run.
    """
    return {
        name: value
        for row in study.rows
        for name, value in changes_of(
            get_recipe(row.recipe_name(scale)).config, recipes[row.key].config
        ).items()
        if name not in row.settings
    }


def in_words(settings: Mapping[str, Any]) -> list[str]:
    """Changed settings as "num_steps=3000"; with the whole path where a name has several."""
    names = [path.rpartition(".")[2] for path, _ in flatten(asdict(RunConfig()))]
    texts = {
        path: "+".join(map(str, value)) if isinstance(value, list) else str(value)
        for path, value in settings.items()
    }
    return [
        f"{path if names.count(name := path.rpartition('.')[2]) > 1 else name}={texts[path]}"
        for path in sorted(texts)
    ]


def folder_name(*first: str, settings: Mapping[str, Any], weights: Weights) -> str:
    """What a folder is called that holds a study, or a record of one.

    Studies that differ in a setting that shapes results have two; archives and teachers are told
    apart by their own names alone.

    Args:
        first: its first words.
        settings: changed in every row.
        weights: that are scored.
    """
    words = [_as_part_of_a_name(text) for text in in_words(settings)]
    return "-".join([*first, *words, *(["last"] if weights == "last" else [])])


def _as_part_of_a_name(text: str) -> str:
    short = re.sub(r"[^\w.+=-]+", "-", text)
    if len(short) > _MOST_LETTERS or short != text:  # two texts must not become one
        short = f"{short[:_MOST_LETTERS]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return short


def changes_of(plain: RunConfig, config: RunConfig) -> dict[str, Any]:
    """Settings that shape a result and are others in `config` than in `plain`, as plain values.

    Of addresses, which tell little of what is there, the last part.
    """
    before, now = _shaping(plain), _shaping(config)
    return {
        name: _last_parts(value) if name in _READ else _as_list(value)
        for name, value in now.items()
        if before[name] != value
    }


def _shaping(config: RunConfig) -> dict[str, Any]:
    every = dict(flatten(asdict(config)))
    return identity(config) | {name: every[name] for name in _READ}


def _last_parts(addresses: str | Sequence[str]) -> str | list[str]:
    if isinstance(addresses, str):
        return addresses.rstrip("/").rpartition("/")[2]
    return [address.rstrip("/").rpartition("/")[2] for address in addresses]


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
