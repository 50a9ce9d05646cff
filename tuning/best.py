"""The best point of a search: its settings as a file to train from, its scores on the test split.

SEARCH/best.yaml    the settings (`export`)
SEARCH/best.json    which points were scored on the test split, the newest last
SEARCH/best/        with best=retrain: the runs on new seeds

A search chooses by validation errors alone. The test split is used when all is chosen, and a run is
scored on it once; the scores stay with the run and are read from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from tmu_dist.config import RunConfig
from tmu_dist.config.run import flatten
from tmu_dist.data.storage import MissingObjectError, join_url, read_text
from tmu_dist.evaluation.result import JSON_NAME, MODEL, PERSISTENCE, EvaluationResult
from tmu_dist.folders import write_text
from tmu_dist.ledger.records import EVALUATION_FOLDER
from tmu_dist.ledger.runs import evaluate_run, is_done
from tmu_dist.training.launch import with_absolute_paths
from tmu_dist.training.many import Job, run_many
from tmu_dist.training.run_log import git_revision
from tuning.findings import Findings, PointFinding
from tuning.plan import Search
from tuning.space import SEED

SETTINGS_FILE = "best.yaml"
SCORED_FILE = "best.json"


class ScoringError(RuntimeError):
    """The best point could not be trained again, or not be scored."""


@dataclass(frozen=True, kw_only=True)
class BestResult:
    """The best point, by what it was chosen, and what it is worth."""

    point_number: int
    label: str
    metric: str
    """The validation error that it was chosen by."""
    validation: Mapping[int, float]
    """That error by the search's seeds."""
    is_retrained: bool
    """The runs that were scored are new ones, on seeds that nothing was chosen by."""
    runs: Mapping[int, str]
    """Folders of the runs that were scored by seed, from the search's folder."""
    test: Mapping[str, Mapping[int, float]]
    """Their scores on the test split, by metric and seed."""
    persistence: Mapping[str, float]
    """Scores of persistence there, by metric."""
    definitions: Mapping[str, str]
    """What each metric means."""
    command: str
    """Trains it again."""
    earlier: tuple[str, ...]
    """Labels of other points that were the best before more was tried, and were scored then: the
    test split is no longer untouched."""


def choose(findings: Findings) -> PointFinding | None:
    """The point with the lowest validation error over its seeds; None: none is whole yet."""
    return findings.ranked[0] if findings.ranked else None


def export(search: Search, point: PointFinding) -> str:
    """The run of a point as a file that `python -m tmu_dist.train --config` takes.

    It has every setting, so the run is the same on top of any recipe; trains where the search did;
    and has the search's first seed and a run folder of its own, beside the search.
    """
    config = _settings(search, point)
    assert point.error is not None
    errors = ", ".join(f"{error:.6g} (seed {s})" for s, error in point.error.by_seed.items())
    header = [
        f"The best settings that the search {search.name} found: {point.label or 'the recipe'}.",
        f"Validation {search.options.error}: {point.error.mean:.6g}, the mean of {errors}.",
        "Every setting of the run is here, so that it is the same on top of any recipe:",
        "",
        f"    python -m tmu_dist.train --config {SETTINGS_FILE}",
        "",
        f"Searched in {search.folder} (point {point.number}),",
        f"with the code of revision {git_revision()}.",
        f"What is not as in the recipe {search.recipe}, but for the run folder:",
        *(f"    {line}" for line in _differences(search.base, config)),
    ]
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header)
    return f"{comment}\n{yaml.safe_dump(asdict(config), sort_keys=False)}"


def score(search: Search, point: PointFinding, parallel: int | None = None) -> BestResult:
    """Score a point's runs on the test split, each once, and remember that it was done.

    Args:
        search: that it is the best point of.
        point: with an error, or there is nothing to choose it by.
        parallel: runs at once, as in `run_many`.

    Raises:
        ScoringError: a run could not be trained again or scored; the others' scores are kept.
        ConfigError, StorageError: as `run_many`; the store cannot be reached.
    """
    configs = _runs_to_score(search, point)
    missing = [config for config in configs.values() if not is_done(config.output)]
    jobs = [Job(config=config, then=evaluate_run) for config in missing]
    outcomes = run_many(jobs, search.base.launch, parallel)
    if errors := [f"{j.name}: {o.error}" for j, o in zip(jobs, outcomes) if o.error is not None]:
        raise ScoringError(
            f"{len(errors)} of {len(configs)} runs of the best point ({point.label}) could not be "
            f"scored on the test split: {'; '.join(errors)}. The same command tries again; scores "
            "that are there are kept."
        )
    _remember(search, point, {seed: config.output for seed, config in configs.items()})
    found = read_best(search.folder)
    assert found is not None
    return found


def read_best(folder: str) -> BestResult | None:
    """The point that a search scored last, with its scores; None: nothing was scored.

    Raises:
        ValueError: best.json or an evaluation is of another version.
        MissingObjectError: a run that was scored is gone.
        StorageError: the store cannot be reached.
    """
    scored = _scored(folder)
    if not scored:
        return None
    *earlier, best = scored
    runs = {int(seed): run for seed, run in best["runs"].items()}
    evaluations = {seed: _evaluation(join_url(folder, run)) for seed, run in runs.items()}
    first = next(iter(evaluations.values()))
    others = {e["label"] for e in earlier if e["point_number"] != best["point_number"]}
    return BestResult(
        point_number=best["point_number"],
        label=best["label"],
        metric=best["metric"],
        validation={int(seed): error for seed, error in best["validation"].items()},
        is_retrained=best["is_retrained"],
        runs=runs,
        test={
            metric: {seed: found.overall[MODEL][metric] for seed, found in evaluations.items()}
            for metric in first.overall[MODEL]
        },
        persistence=first.overall[PERSISTENCE],
        definitions=first.definitions,
        command=f"python -m tmu_dist.train --config {join_url(folder, SETTINGS_FILE)}",
        earlier=tuple(sorted(others)),
    )


def _settings(search: Search, point: PointFinding) -> RunConfig:
    config = search.stages(0, point.point, search.options.seeds[0])[-1].config
    beside = f"{search.folder.rstrip('/')}-best"
    return with_absolute_paths(replace(config, output=beside))


def _differences(base: RunConfig, config: RunConfig) -> list[str]:
    before = dict(flatten(asdict(base)))
    return [
        f"{path}: {list(value) if isinstance(value, tuple) else value}"
        for path, value in flatten(asdict(config))
        if path not in ("output", SEED) and value != before[path]
    ] or ["nothing"]


def _runs_to_score(search: Search, point: PointFinding) -> dict[int, RunConfig]:
    """By seed: the point's own whole runs, or new ones, whose folders are named by the point."""
    found: dict[int, RunConfig] = {}
    if search.options.best == "take":
        for trial in (record.trial for record in point.trials if record.is_whole):
            config = search.stages(trial.number, trial.point, trial.seed)[-1].config
            found.setdefault(trial.seed, config)  # a point at random may have come twice
        return found
    for seed in search.options.retrain_seeds:
        config = search.stages(0, point.point, seed)[-1].config
        folder = join_url(search.folder, f"best/point-{point.number}-seed-{seed}")
        found[seed] = replace(config, output=folder)
    return found


def _remember(search: Search, point: PointFinding, runs: Mapping[int, str]) -> None:
    """Write down what was scored, the newest last and nothing twice."""
    assert point.error is not None
    folder = search.folder.rstrip("/")
    entry = {
        "point_number": point.number,
        "label": point.label,
        "metric": search.options.error,
        "validation": {str(seed): error for seed, error in point.error.by_seed.items()},
        "is_retrained": search.options.best == "retrain",
        "runs": {str(seed): run.removeprefix(f"{folder}/") for seed, run in runs.items()},
    }
    before = _scored(folder)
    if before[-1:] != [entry]:
        scored = [*(each for each in before if each != entry), entry]
        write_text(folder, SCORED_FILE, json.dumps({"scored": scored}, indent=1) + "\n")


def _scored(folder: str) -> Sequence[dict[str, Any]]:
    try:
        text = read_text(folder, SCORED_FILE)
    except MissingObjectError:
        return []
    try:
        return list(json.loads(text)["scored"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{join_url(folder, SCORED_FILE)} was not written by this version ({error}): remove "
            "it, and the best point is looked up again without a new evaluation."
        ) from None


def _evaluation(run: str) -> EvaluationResult:
    text = read_text(join_url(run, EVALUATION_FOLDER), JSON_NAME)
    return EvaluationResult.from_dict(json.loads(text))
