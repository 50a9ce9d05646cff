"""Searches on a real Ray: every trial is accounted for, and every place in the cluster comes back.

Ends that must not depend on how fast the machine is are made so: trials that are to be stopped or
killed have no end of their own, and what they are judged by was trained before.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.descriptors import others_with_open
from tests.e2e.test_run_in_store import newest_step
from tests.ray.conftest import until
from tmu_dist.config import ConfigError, LaunchConfig, RunConfig, ScaleConfig, with_overrides
from tmu_dist.folders import list_folders
from tmu_dist.run_folder import RESULT_FILE, read_log
from tmu_dist.training.launch import launch
from tuning.agenda import Agenda
from tuning.journal import Journal, Trial, read_trials
from tuning.plan import Search, SearchConfig
from tuning.records import outcome_of, read_records
from tuning.samplers import make_sampler
from tuning.space import Axis, Space

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

RATE, STEPS = "training.learning_rate", "training.num_steps"
ENDLESS = 10**6


def make_search(
    base: RunConfig, rates: tuple[float, ...], *, whole: Mapping[float, int] = {}, **options: Any
) -> Search:
    """A search over learning rates.

    Args:
        base: of every run.
        rates: to try, in this order.
        whole: iterations of those that end by themselves; the others go on until they are stopped.
        options: of the search.
    """
    axes = [Axis(name=RATE, values=rates)]
    if whole:
        (steps,) = set(whole.values())
        axes.append(Axis(name=STEPS, values=(steps,), when={RATE: tuple(whole)}))
        base = with_overrides(base, {STEPS: ENDLESS})
    return Search(
        folder=f"{base.output}-search",
        recipe="tiny",
        command="none",
        base=with_overrides(base, {"schedule.validate_every": 4, "schedule.checkpoint_every": 4}),
        space=Space(name="rates", axes=tuple(axes)),
        options=SearchConfig(**options),
    )


def train_before(search: Search, points: int) -> None:
    """Train the first points here, as an earlier start of the search would have left them."""
    journal, sampler = Journal(search.folder), make_sampler(search.space, search.options)
    for number in range(points):
        point = sampler.ask()
        assert point is not None
        trial = journal.add(number, point, search.options.seeds[0])
        (stage,) = search.stages(trial.number, point, trial.seed)
        local = replace(stage.config, launch=LaunchConfig(launcher="local"), scale=ScaleConfig())
        launch(local)
        journal.note(number, state="finished")


def run(search: Search) -> tuple[Trial, ...]:
    """Run what is left of a search, and make sure that the cluster is as it was."""
    from tuning.engine import run_trials

    journal = Journal(search.folder)
    agenda = Agenda(
        journal,
        make_sampler(search.space, search.options),
        search.options.seeds,
        search.options.scheduler != "none",
        lambda trial: outcome_of(search, trial, lambda config, steps: None),
    )
    ended = [trial for trial in journal.trials if trial.state != "open"]
    run_trials(search, agenda, read_records(search, ended))
    assert_all_places_are_free()
    trials = read_trials(search.folder)
    assert trials == tuple(journal.trials)
    return trials


def assert_all_places_are_free() -> None:
    import ray
    from ray.util import placement_group_table

    until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], 60)
    until(lambda: {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}, 60)


def states(trials: tuple[Trial, ...]) -> list[str]:
    return [trial.state for trial in trials]


def assert_stopped_whole(search: Search, trial: Trial, reason: str) -> None:
    """It said why, ended with a checkpoint of its last iteration, and went no further."""
    assert (trial.state, trial.reason) == ("stopped", reason)
    folder = search.trial_folder(trial.number)
    last = read_log(folder)[-1]
    assert last["event"] == "stop" and last["step"] == newest_step(folder)
    assert not Path(folder, RESULT_FILE).exists()


def holders(folder: str) -> list[int]:
    """Processes that train in a run folder, by the lock that they hold open."""
    return others_with_open(f"{folder}/.lock")


def kill_in(folder: str, step: int) -> None:
    """Kill who trains in a folder once it has written a checkpoint at or after an iteration."""

    def is_there() -> bool:
        return bool(list_folders(folder, "checkpoints", "training.json")) and (
            newest_step(folder) >= step and bool(holders(folder))
        )

    until(is_there)
    for process in holders(folder):
        os.kill(process, signal.SIGKILL)


def test_a_dozen_trials_most_of_which_are_stopped(tiny_config: RunConfig) -> None:
    rates = (1e-2, *(1e-3 - 5e-5 * n for n in range(11)))  # each worse than those before
    search = make_search(
        tiny_config, rates, whole={rates[0]: 8}, scheduler="asha", grace_steps=8, reduction=3.0
    )
    train_before(search, 1)
    trials = run(search)
    assert [trial.point[RATE] for trial in trials] == list(rates)
    assert states(trials) == ["finished"] + 11 * ["stopped"]
    for trial in trials[1:]:
        assert_stopped_whole(search, trial, "asha at 8")


def test_trials_on_ray_train_give_their_workers_back(tiny_config: RunConfig) -> None:
    """The one that is stopped, and the one whose own process dies and leaves workers behind."""
    base = replace(
        tiny_config, launch=LaunchConfig(launcher="ray"), scale=ScaleConfig(num_workers=2)
    )
    rates = (1e-2, 1e-5, 2e-2)
    search = make_search(
        base, rates, whole={1e-2: 40, 2e-2: 40}, scheduler="asha", grace_steps=20, reduction=3.0
    )
    train_before(search, 1)
    killer = threading.Thread(target=kill_in, args=(search.trial_folder(2), 4))
    killer.start()
    trials = run(search)
    killer.join()
    assert states(trials) == ["finished", "stopped", "finished"]
    assert_stopped_whole(search, trials[1], "asha at 20")
    assert [trial.failures for trial in trials] == [0, 0, 1]
    events = read_log(search.trial_folder(2))
    (resumed,) = [event["step"] for event in events if event["event"] == "resume"]
    assert resumed >= 4 and events[-1]["step"] == 40


def test_lost_processes_and_points_that_cannot_be_trained(tiny_config: RunConfig) -> None:
    rates = (1e-3, 1e30, 2e-3, 3e-3, 4e-3)
    lost, ruined, blocked, always_lost = range(4)
    search = make_search(
        tiny_config, rates, whole={rate: 200 for rate in rates if rate != 3e-3}, retries=1
    )
    Path(search.folder, "trials").mkdir(parents=True)
    Path(search.trial_folder(blocked)).write_text("in the way")
    killers = [
        threading.Thread(target=kill_in, args=(search.trial_folder(lost), 8)),
        threading.Thread(
            target=lambda: [kill_in(search.trial_folder(always_lost), 4 * k) for k in (1, 4)]
        ),
    ]
    for killer in killers:
        killer.start()
    trials = run(search)
    for killer in killers:
        killer.join()
    expected = ["finished", "failed", "failed", "failed", "finished"]
    assert states(trials) == expected
    assert [trial.failures for trial in trials] == [1, 0, 1, 1, 0]
    resumes = [e["step"] for e in read_log(search.trial_folder(lost)) if e["event"] == "resume"]
    assert len(resumes) == 1 and resumes[0] >= 8
    assert (trials[ruined].reason or "").startswith("NonFiniteLossError: ")
    assert (trials[blocked].reason or "").startswith("FileExistsError: ")
    assert trials[always_lost].reason == "its process died"


def test_by_fraction_and_only_the_first_seed_is_judged(tiny_config: RunConfig) -> None:
    base = with_overrides(tiny_config, {STEPS: 16})
    search = make_search(
        base,
        (1e-2, 1e-5, 1e-6),
        scheduler="asha",
        fidelity="fraction",
        fractions=(0.25, 0.5, 1.0),
        reduction=2.0,
        seeds=(0, 1),
        concurrent=1,  # so that the good one comes first
    )
    trials = run(search)
    assert [(trial.point_number, trial.seed, trial.state) for trial in trials] == [
        (0, 0, "finished"),
        (0, 1, "finished"),
        (1, 0, "stopped"),
        (2, 0, "stopped"),
    ]
    assert [trial.reason for trial in trials[2:]] == ["asha at 1", "asha at 1"]
    whole = {
        f"fraction-{fraction}": steps for fraction, steps in (("0.25", 4), ("0.5", 8), ("1", 16))
    }
    for trial in trials:
        runs = sorted(Path(search.trial_folder(trial.number)).glob("fraction-*"))
        steps = {run.name: read_log(run)[-1]["step"] for run in runs}
        assert steps == (whole if trial.state == "finished" else {"fraction-0.25": 4})
        assert all((run / RESULT_FILE).exists() for run in runs)


def test_worse_than_the_median_is_stopped(tiny_config: RunConfig) -> None:
    rates = (1e-2, 9e-3, 8e-3, 7e-3, 6e-3, 1e-6)
    search = make_search(
        tiny_config, rates, whole=dict.fromkeys(rates[:5], 8), scheduler="median", grace_steps=4
    )
    train_before(search, 5)
    trials = run(search)
    assert states(trials) == 5 * ["finished"] + ["stopped"]
    assert_stopped_whole(search, trials[5], "median at 4")


def test_a_cluster_without_room_is_told(tiny_config: RunConfig) -> None:
    base = replace(
        tiny_config, launch=LaunchConfig(launcher="ray"), scale=ScaleConfig(num_workers=3)
    )
    search = make_search(base, (1e-2,))
    with pytest.raises(ConfigError, match=r"has 3 workers, .* room for 2 of 1 CPUs each"):
        run(search)
    elastic = replace(search, base=replace(base, scale=ScaleConfig(num_workers="1..2")))
    with pytest.raises(ConfigError, match="fixed number of workers"):
        run(elastic)
