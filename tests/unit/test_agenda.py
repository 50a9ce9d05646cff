"""Every trial is given away once, however often the driver is killed, and the sampler hears all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tuning.agenda import Agenda, Outcome
from tuning.journal import Journal, State, Trial, read_trials
from tuning.samplers import ListSampler
from tuning.space import Point

POINTS: list[Point] = [{"beta": 0.1}, {"beta": 0.2}, {"beta": 0.3}]
Heard = list[tuple[int, Any]]


class Listening(ListSampler):
    """Gives the points in order and writes down what it is told."""

    def __init__(self, points: Sequence[Point] = POINTS) -> None:
        super().__init__(iter(points))
        self.heard: Heard = []

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        self.heard.append((number, values))

    def tell_stopped(self, number: int, level: float, error: float) -> None:
        self.heard.append((number, ("stopped", level, error)))


def found(trial: Trial) -> Outcome | None:
    """Levels and errors by number and seed, no costs."""
    return 100.0 - trial.number, trial.point_number + 10.0 * trial.seed, None


class Driver:
    """A start of a search in a folder."""

    def __init__(
        self,
        folder: Path,
        seeds: tuple[int, ...] = (0,),
        *,
        has_scheduler: bool = False,
        **parts: Any,
    ) -> None:
        self.sampler = Listening()
        self.agenda = Agenda(
            Journal(str(folder)),
            self.sampler,
            seeds,
            has_scheduler,
            parts.get("found", found),
        )

    def take(self, count: int = 1) -> list[tuple[int, int]]:
        """The next trials, as points and seeds."""
        trials = [self.agenda.next() for _ in range(count)]
        return [(trial.point_number, trial.seed) for trial in trials if trial is not None]

    def end(self, number: int, state: State = "finished") -> None:
        self.agenda.ended(number, state)


def test_every_point_with_every_seed_once(tmp_path: Path) -> None:
    driver = Driver(tmp_path, (3, 1))
    assert driver.take() == [(0, 3)]
    driver.end(0)  # which is no reason to think of its other seed again
    assert driver.take(9) == [(0, 1), (1, 3), (1, 1), (2, 3), (2, 1)]
    assert driver.agenda.next() is None
    assert [trial.number for trial in read_trials(str(tmp_path))] == [0, 1, 2, 3, 4, 5]
    assert [trial.point["beta"] for trial in read_trials(str(tmp_path))] == [
        *(0.1, 0.1, 0.2, 0.2, 0.3, 0.3)
    ]


def test_a_point_is_told_when_its_last_seed_has_ended(tmp_path: Path) -> None:
    driver = Driver(tmp_path, (0, 1))
    driver.take(4)
    driver.end(1)
    assert driver.sampler.heard == []
    driver.end(0)
    assert driver.sampler.heard == [(0, [5.0])], "the mean of errors 0 and 10"
    driver.end(2)
    driver.end(3, "failed")
    assert driver.sampler.heard[1:] == [(1, None)]


def test_costs_are_told_as_the_second_value(tmp_path: Path) -> None:
    driver = Driver(
        tmp_path, (0, 1), found=lambda trial: (8.0, 1.0 + trial.seed, 6.0 + 2 * trial.seed)
    )
    driver.take(2)
    driver.end(0)
    driver.end(1)
    assert driver.sampler.heard == [(0, [1.5, 7.0])]


def test_with_a_scheduler_the_first_seed_decides_and_is_judged_alone(tmp_path: Path) -> None:
    driver = Driver(tmp_path, (0, 1, 2), has_scheduler=True)
    assert driver.take(2) == [(0, 0), (1, 0)]
    driver.end(1, "stopped")
    assert driver.sampler.heard == [(1, ("stopped", 99.0, 1.0))]
    driver.end(0)
    assert driver.sampler.heard == [(1, ("stopped", 99.0, 1.0))], "two seeds are to come"
    assert driver.take(9) == [(0, 1), (0, 2), (2, 0)], "a good one's seeds before new points"
    trials = read_trials(str(tmp_path))
    assert [driver.agenda.is_judged(trial) for trial in trials] == [True, True, False, False, True]
    driver.agenda.failed_once(4)
    assert driver.agenda.is_judged(trials[4]), "as it was given away"
    driver.end(2)
    driver.end(3)
    assert driver.sampler.heard[1:] == [(0, [10.0])]


@pytest.mark.parametrize("has_scheduler", [False, True])
def test_a_killed_driver_changes_nothing(tmp_path: Path, has_scheduler: bool) -> None:
    ends: dict[int, State] = {0: "finished", 1: "stopped" if has_scheduler else "finished"}
    seeds = (0, 1)

    def start(folder: Path) -> Driver:
        return Driver(folder, seeds, has_scheduler=has_scheduler)

    straight, killed = start(tmp_path / "straight"), start(tmp_path / "killed")
    for driver in (straight, killed):
        driver.take(3)
        for number, state in ends.items():
            driver.end(number, state)
    again = start(tmp_path / "killed")
    assert again.sampler.heard == straight.sampler.heard
    assert again.take(1) == [(2, 0) if has_scheduler else (1, 0)], "open trials come first"
    assert again.take(9) == straight.take(9)
    assert read_trials(str(tmp_path / "killed")) == read_trials(str(tmp_path / "straight"))


def test_seeds_that_were_added_are_trained_where_they_may_be(tmp_path: Path) -> None:
    driver = Driver(tmp_path, (0,), has_scheduler=True)
    driver.take(3)
    driver.end(0)
    driver.end(1, "stopped")
    driver.end(2, "failed")
    again = Driver(tmp_path, (0, 7), has_scheduler=True)
    assert again.take(9) == [(0, 7)]


def test_nothing_is_read_of_a_trial_that_failed(tmp_path: Path) -> None:
    def unreadable(trial: Trial) -> Outcome | None:
        raise ValueError("its settings contradict each other")

    driver = Driver(tmp_path, found=unreadable)
    driver.take(2)
    driver.end(0, "failed")
    assert driver.sampler.heard == [(0, None)]
    assert Driver(tmp_path, found=unreadable).sampler.heard == [(0, None)]
    with pytest.raises(ValueError, match="contradict"):
        driver.end(1)


def test_a_trial_without_any_validation_is_no_result(tmp_path: Path) -> None:
    driver = Driver(tmp_path, found=lambda trial: None, has_scheduler=True)
    driver.take(1)
    driver.end(0, "stopped")
    assert driver.sampler.heard == [(0, None)]
