"""All checks of the doctor in turn: this machine, the nodes, the ranks. None hides another."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from traceback import extract_tb
from typing import Any, Literal, TypeVar

from tmu_dist.collectives import Collectives
from tmu_dist.config import RunConfig
from tmu_dist.doctor.findings import CHECKS, Finding, as_record
from tmu_dist.doctor.node_judgements import judge_nodes, judge_token
from tmu_dist.doctor.nodes import code_versions, look_at_node
from tmu_dist.doctor.places import marked, wanted_of
from tmu_dist.recipes.base import Recipe
from tmu_dist.train import lacks_archive, missing_teachers
from tmu_dist.training.launch import absolute, pick_device, with_absolute_paths

log = logging.getLogger(__name__)

T = TypeVar("T")

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the entry command of a submitted job."""
_OF_NODES = ("nodes", "versions", "gpus", "clock", "cache", "storage")
_OF_RANKS = ("exchange", "teachers", "step", "loader")


@dataclass(kw_only=True)
class Report:
    """What was found, and how long each part took."""

    findings: list[Finding] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    num_nodes: int = 0

    def as_record(self) -> dict[str, Any]:
        """For machines."""
        return {
            **as_record(self.findings),
            "seconds": {part: round(seconds, 3) for part, seconds in self.seconds.items()},
            "nodes": self.num_nodes,
            "versions": code_versions(),
        }

    def run(self, part: str, check: str, advice: str, action: Callable[[], T]) -> T | None:
        """Do a part and time it; an error becomes a fault of `check`, and None is returned."""
        log.info("looking at %s ...", part)
        started = time.monotonic()
        try:
            return action()
        except Exception as error:  # told as a finding, so that it hides no other check
            said = str(error).strip() or type(error).__name__
            if not isinstance(error, ValueError):
                frame = extract_tb(error.__traceback__)[-1]
                where = f"{Path(frame.filename).name}:{frame.lineno}"
                said = f"{type(error).__name__} ({where}): {said}"
            self.findings.append(Finding(check=check, status="fault", found=said, advice=advice))
            return None
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started

    def skip(self, checks: tuple[str, ...], why: str) -> None:
        """Say why there is no finding of some checks, of those that have none."""
        has = {finding.check for finding in self.findings}
        self.findings += [
            Finding(check=check, status="skipped", found=why)
            for check in checks
            if check not in has
        ]

    def add(self, findings: list[Finding]) -> None:
        """Take findings, without those that only say that a check was left out elsewhere."""
        has = {finding.check for finding in self.findings}
        self.findings += [f for f in findings if f.status != "skipped" or f.check not in has]

    def has_fault(self, *checks: str) -> bool:
        """Whether one of these checks found a fault."""
        return any(each.status == "fault" and each.check in checks for each in self.findings)


def examine(recipe: Recipe, collectives: Collectives, *, only_here: bool = False) -> Report:
    """Make all checks; every rank of a torchrun job calls this, and rank 0's report counts.

    Args:
        recipe: the run, and what can be made for it.
        collectives: of the processes that call this: one, but with torchrun.
        only_here: look at this machine only, as the one where jobs are submitted from.
    """
    report, config = Report(), recipe.config
    is_main = collectives.ranks.is_main
    if only_here or (config.launch.launcher == "ray" and _is_outside()):
        if is_main:
            _look_here(report)
        why = "Needs the cluster: `ray job submit --working-dir . -- python -m tmu_dist.doctor`."
        report.skip((*_OF_NODES, *_OF_RANKS), why)
        return report
    ranks_try = collectives.broadcast_object(_look_at_nodes(report, recipe) if is_main else "")
    if ranks_try:
        _look_at_ranks(report, config, collectives, inputs_ready=ranks_try == "all")
    else:
        why = "Correct the faults of nodes, GPUs and storage first."
        report.skip((*_OF_NODES, *_OF_RANKS), why)
    report.skip(tuple(CHECKS), "Nothing is submitted from here.")
    return report


def _dashboard() -> str | None:
    """Address of the cluster's dashboard, if the environment names it, as for `ray job submit`."""
    given = (os.environ.get(name, "") for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"))
    return next((address for address in given if address.startswith("http")), None)


def _is_outside() -> bool:
    """Whether of the cluster only its dashboard is known, as where jobs are submitted from."""
    joins = os.environ.get("RAY_ADDRESS", "http")
    return _JOB not in os.environ and joins.startswith("http") and _dashboard() is not None


def _look_here(report: Report) -> None:
    """This machine, where jobs are submitted from."""

    def look() -> list[Finding]:
        import tmu_dist.training.ray_cluster  # noqa: F401  before ray, which here.py imports
        from tmu_dist.doctor.here import judge_here, look_here

        return judge_here(look_here(Path.cwd(), _dashboard()))

    advice = "Run it where `ray job submit` is run, in the root of the project."
    report.findings += report.run("this machine", "working directory", advice, look) or []


def _look_at_nodes(report: Report, recipe: Recipe) -> Literal["all", "exchange", ""]:
    """All nodes; returns what ranks can try: nothing if they could not even start."""
    correct = "Correct what the message names."
    pending = [
        *(report.run("archives", "storage", correct, lambda: _archives_to_make(recipe)) or []),
        *(report.run("teachers", "teachers", correct, lambda: _teachers_to_train(recipe)) or []),
    ]
    report.findings += [finding for _, finding in pending]
    uses_ray = recipe.config.launch.launcher == "ray"
    look = _nodes_of_ray if uses_ray else _this_node
    findings = report.run(
        "nodes",
        "nodes",
        "Start Ray on all nodes (cluster/README.md), or correct RAY_ADDRESS and RAY_AUTH_MODE."
        if uses_ray
        else correct,
        lambda: look(report, recipe.config, [folder for folder, _ in pending]),
    )
    report.findings += findings or []
    if report.has_fault("nodes", "gpus", "storage"):
        return ""
    return "exchange" if pending or report.has_fault("teachers") else "all"


def _archives_to_make(recipe: Recipe) -> list[tuple[str, Finding]]:
    """Archives that are not there yet, and that training makes first.

    Raises:
        StorageError: a store cannot be reached.
    """
    url = recipe.config.data.url
    if not lacks_archive(recipe, url):
        return []
    arguments = shlex.join(recipe.archives[url])
    warning = Finding(
        check="storage",
        status="warning",
        found=f"data.url: {url} is not there yet; training makes it first.",
        advice=f"Make it before GPUs are paid for: python -m data_prep {arguments}",
    )
    return [(absolute(url), warning)]


def _teachers_to_train(recipe: Recipe) -> list[tuple[str, Finding]]:
    """Teachers that are not there yet, and that training trains first.

    Raises:
        ConfigError: one would not fit the student.
        StorageError: a store cannot be reached.
    """
    missing = [teacher.config.output for teacher in missing_teachers(recipe)]
    return [
        (
            absolute(run),
            Finding(
                check="teachers",
                status="warning",
                found=f"{run} is not trained yet; training trains it first.",
                advice="Nothing to do, if that is meant; else correct transfer.teachers.",
            ),
        )
        for run in missing
    ]


def _this_node(report: Report, config: RunConfig, pending: list[str]) -> list[Finding]:
    node = look_at_node(wanted_of(with_absolute_paths(config), without=pending), "")
    report.num_nodes = 1
    wants_gpu = config.launch.device == "cuda"
    return judge_nodes([node], {}, asking=node.versions, wants_gpu=wants_gpu)


def _nodes_of_ray(report: Report, config: RunConfig, pending: list[str]) -> list[Finding]:
    from tmu_dist.doctor.ray_nodes import look_at_nodes
    from tmu_dist.training.ray_cluster import store_variables

    config = with_absolute_paths(config)
    wanted = wanted_of(config, without=pending)
    with marked(wanted) as asked:
        seen = look_at_nodes(asked, store_variables(place.url for place in wanted.places))
    report.num_nodes = len(seen.nodes) + len(seen.silent)
    wants_gpu = config.launch.device == "cuda"
    return [
        *judge_nodes(seen.nodes, seen.silent, asking=code_versions(), wants_gpu=wants_gpu),
        *judge_token(seen.nodes, seen.listens_at, is_own=seen.is_own),
    ]


def _look_at_ranks(
    report: Report, config: RunConfig, collectives: Collectives, *, inputs_ready: bool
) -> None:
    """The ranks together, which every rank of a torchrun job takes part in."""

    def look() -> list[Finding]:
        from tmu_dist.doctor.rank_findings import judge_ranks

        absolute_config = with_absolute_paths(config)
        if config.launch.launcher == "ray":
            from tmu_dist.doctor.ray_ranks import look_at_ranks_on_ray

            return judge_ranks(look_at_ranks_on_ray(absolute_config, inputs_ready=inputs_ready))
        from tmu_dist.doctor.ranks import look_at_ranks

        device = pick_device(config.launch.device, local_rank=collectives.ranks.local_rank)
        seen = look_at_ranks(absolute_config, collectives, device, inputs_ready=inputs_ready)
        return judge_ranks(seen)

    advice = "Correct what the message names; scale.num_workers and launch.* say where ranks run."
    report.add(report.run("ranks", "exchange", advice, look) or [])
