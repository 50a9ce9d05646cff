"""What a search is asked for: its options, and the runs that one trial of it consists of.

SEARCH/search.json    what shapes it; the same command again must agree with it
SEARCH/trials.json    every trial so far, and how it ended (`journal`)
SEARCH/trials/0007/   of each trial an ordinary run folder, or one for each fraction of the data
SEARCH/tune/          what Ray Tune keeps of each start: its tables, its TensorBoard
SEARCH/best.yaml      the best settings, for `python -m tmu_dist.train --config`
SEARCH/report.html    and trials.csv, trials.parquet, results.json: written again at every end

SEARCH is a local path or the URL of a folder in an object store.

A trial is one point of the space with one seed. Seeds are repetitions: what is said of a point is
said over its seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import TypeAdapter

from tmu_dist.config import ConfigError, RunConfig, from_dict, identity, with_overrides
from tmu_dist.config.checks import require
from tmu_dist.data.storage import MissingObjectError, exists, join_url, read_text
from tmu_dist.folders import write_text
from tmu_dist.ledger.arms import stretched
from tuning.space import FRACTION, Axis, Point, Space, run_of

SEARCH_FILE = "search.json"

ERRORS = ("mse_per_frame", "mae_per_frame")
"""What runs validate by (`evaluation.metrics`, which loads more than a search's --help needs)."""
COSTS = ("operations", "teachers")
"""Second objectives: operations of training, and how many teachers run beside the student."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Options of a search."""

    sampler: Literal["grid", "random", "tpe"] = "grid"
    """grid: every point; random: points at random; tpe: points like those that did well (Optuna's
    tree-structured Parzen estimator, all axes together)."""
    num_samples: int | None = None
    """Points of random and tpe; a grid has its own number."""
    sampler_seed: int = 0
    seeds: tuple[int, ...] = (0,)
    """Each point is trained with all of them."""
    objectives: tuple[str, ...] = ("mse_per_frame",)
    """An error of the validation split; and a cost (operations, teachers) that tpe weighs against
    it."""
    scheduler: Literal["none", "asha", "median"] = "none"
    """asha: a trial goes on past a rung if it is among the best 1/`reduction` of those that have
    reached it (asynchronous successive halving); median: while its best error is below the
    median of the others' average errors so far."""
    fidelity: Literal["step", "fraction"] = "step"
    """What rungs are of: iterations of one run, or runs on growing, nested fractions of the target
    data, whose iterations grow with them."""
    fractions: tuple[float, ...] = ()
    """fidelity=fraction: fractions of the target data, in rising order."""
    grace_steps: int | None = None
    """fidelity=step: the first rung of asha, and of median the first step at which it stops; None:
    an eighth of the iterations."""
    reduction: float = 3.0
    """Of asha: one in so many goes on."""
    concurrent: int | None = None
    """Trials at once, at most; None: as many as the cluster has room for."""
    retries: int = 2
    """How often a trial whose processes or store failed is started again."""
    best: Literal["take", "retrain"] = "take"
    """take: the best point's own runs are scored on the test split; retrain: new ones, on
    `retrain_seeds`, that the search has not selected by."""
    retrain_seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(len(self.seeds) > 0, "--seeds needs one at least.")
        require(
            len(set(self.seeds)) == len(self.seeds), f"--seeds {self.seeds} names a seed twice."
        )
        require(
            (self.num_samples is None) == (self.sampler == "grid"),
            f"--num-samples goes with --sampler random and tpe, which need it; the sampler is "
            f"{self.sampler}, the number {self.num_samples}.",
        )
        require(
            self.num_samples is None or self.num_samples >= 1,
            f"--num-samples {self.num_samples} must be at least 1.",
        )
        self._check_objectives()
        self._check_scheduler()
        require(
            self.concurrent is None or self.concurrent >= 1,
            f"--concurrent {self.concurrent} must be at least 1.",
        )
        require(self.retries >= 0, f"--retries {self.retries} must be at least 0.")
        require(
            (self.best == "retrain") == bool(self.retrain_seeds),
            "--best retrain and --retrain-seeds go together: seeds that the search has not used.",
        )
        require(
            not set(self.retrain_seeds) & set(self.seeds),
            f"--retrain-seeds {self.retrain_seeds} must be others than --seeds {self.seeds}, by "
            "whose runs the best point was chosen.",
        )

    def _check_objectives(self) -> None:
        error, *costs = self.objectives or ("",)
        require(
            error in ERRORS,
            f"--objectives {error}: the first one is an error that runs validate by: "
            f"{', '.join(ERRORS)}.",
        )
        require(
            len(costs) <= 1 and all(cost in COSTS for cost in costs),
            f"--objectives {' '.join(self.objectives)}: beside the error there may be one of "
            f"{', '.join(COSTS)}.",
        )
        require(
            not costs or self.sampler == "tpe",
            f"--objectives {' '.join(self.objectives)} only has an effect with --sampler tpe; the "
            "report shows skill against cost in any case.",
        )
        require(
            not costs or self.scheduler == "none",
            "--objectives with a cost compares whole trials: use --scheduler none.",
        )

    def _check_scheduler(self) -> None:
        by_fraction = self.fidelity == "fraction"
        require(
            by_fraction == bool(self.fractions),
            "--fidelity fraction and --fractions go together, such as --fractions 0.25 0.5 1.",
        )
        require(
            all(a < b for a, b in zip((0.0, *self.fractions), self.fractions)),
            f"--fractions {self.fractions} must be positive and rise.",
        )
        require(
            not by_fraction or self.scheduler == "asha",
            f"--fidelity fraction needs --scheduler asha, not {self.scheduler}.",
        )
        require(
            self.grace_steps is None or (self.scheduler != "none" and not by_fraction),
            "--grace-steps only has an effect with a scheduler by steps.",
        )
        require(
            self.grace_steps is None or self.grace_steps >= 1,
            f"--grace-steps {self.grace_steps} must be at least 1.",
        )
        require(self.reduction > 1, f"--reduction {self.reduction} must be above 1.")

    @property
    def error(self) -> str:
        """The error that trials are compared by; lower is better."""
        return self.objectives[0]

    @property
    def cost(self) -> str | None:
        """The second objective; lower is better."""
        return self.objectives[1] if len(self.objectives) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of a trial."""

    config: RunConfig
    fraction: float | None
    """Of the target data, where that is the fidelity."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """A whole search, before anything is run."""

    folder: str
    recipe: str
    command: str
    """That started it last, and continues it."""
    base: RunConfig
    """Every run before the space changes it; its addresses are absolute."""
    space: Space
    options: SearchConfig

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.rstrip("/").rpartition("/")[2]

    def trial_folder(self, number: int) -> str:
        """Where a trial's runs lie."""
        return join_url(self.folder, f"trials/{number:04d}")

    def rung(self, level: float) -> float:
        """Where a trial is on its scheduler's scale.

        Args:
            level: its iterations; or the fraction of the data, where rungs are a `reduction` apart.
        """
        fractions = self.options.fractions
        return self.options.reduction ** fractions.index(level) if fractions else level

    def stages(self, number: int, point: Point, seed: int) -> tuple[Stage, ...]:
        """The runs of one trial, in their order; one, unless fractions are the fidelity.

        Raises:
            ConfigError: the settings contradict each other there.
        """
        config = run_of(self.base, self.space, point, seed)
        folder = self.trial_folder(number)
        fractions = self.options.fractions
        if not fractions:
            return (Stage(config=replace(config, output=folder), fraction=None),)
        return tuple(
            Stage(config=_on_fraction(config, each, fractions[-1], folder), fraction=each)
            for each in fractions
        )


def _on_fraction(config: RunConfig, fraction: float, whole: float, folder: str) -> RunConfig:
    """A run on part of the data, each sequence of which it sees as often as the whole run does."""
    shorter = stretched(config, fraction / whole)
    return with_overrides(
        shorter, {"output": f"{folder}/fraction-{fraction:g}", FRACTION: fraction}
    )


def _flag(name: str) -> str:
    return name.replace("_", "-")


def save_search(search: Search) -> None:
    """Write search.json.

    Raises:
        ConfigError: the folder holds another search; says in what they differ.
        WriteError, StorageError: it cannot be written.
    """
    wanted = _as_json(search)
    if exists(search.folder, SEARCH_FILE):
        saved = json.loads(read_text(search.folder, SEARCH_FILE))
        before, now = _shape(saved), _shape(wanted)
        changes = [
            f"{path}: there {before.get(path)!r}, here {now.get(path)!r}"
            for path in sorted(before.keys() | now.keys())
            if before.get(path) != now.get(path)
        ]
        require(
            not changes,
            f"{search.folder} holds another search ({'; '.join(changes[:5])}). Trials of the two "
            "cannot be compared: choose another folder with --out.",
        )
    write_text(search.folder, SEARCH_FILE, json.dumps(wanted, indent=1) + "\n")


def load_search(folder: str) -> Search:
    """Read what `save_search` wrote; the folder may have been moved.

    Raises:
        ConfigError: there is no search of this version.
        StorageError: the store cannot be reached.
    """
    try:
        tree = json.loads(read_text(folder, SEARCH_FILE))
        space = tree["space"]
        return Search(
            folder=folder,
            recipe=tree["recipe"],
            command=tree["command"],
            base=from_dict(tree["base"]),
            space=Space(
                name=space["name"],
                axes=tuple(TypeAdapter(Axis).validate_python(axis) for axis in space["axes"]),
                settings=space["settings"],
            ),
            options=with_overrides(SearchConfig(), tree["options"]),
        )
    except MissingObjectError:
        raise ConfigError(
            f"{folder} holds no {SEARCH_FILE}: name the --out folder of `python tuning/search.py`."
        ) from None
    except (KeyError, TypeError, ValueError) as error:  # of JSON, of types, of settings
        raise ConfigError(
            f"{join_url(folder, SEARCH_FILE)} was not written by this version ({error})."
        ) from None


_FREE_OPTIONS = ("num_samples", "seeds", "concurrent", "retries", "best", "retrain_seeds")
"""Options that a later start of a search may have otherwise."""


def _as_json(search: Search) -> dict[str, Any]:
    tree = asdict(search)
    del tree["folder"]
    return dict(json.loads(json.dumps(tree)))  # tuples become lists, as they will be read


def _shape(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What two starts of one search must have in common, by name."""
    base = from_dict(tree["base"])
    options = {k: v for k, v in tree["options"].items() if k not in _FREE_OPTIONS}
    axes = {axis["name"]: axis for axis in tree["space"]["axes"]}
    addresses = {"data.url": base.data.url, "data.mix_with": base.data.mix_with}
    return {
        **identity(base),
        **addresses,
        "transfer.teachers": base.transfer.teachers,
        **{f"axis {name}": axis for name, axis in axes.items()},
        **{f"settings {name}": value for name, value in tree["space"]["settings"].items()},
        **{f"--{_flag(name)}": value for name, value in options.items()},
    }
