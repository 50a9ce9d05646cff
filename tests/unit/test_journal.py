"""What is written down of trials is read again as it was, after every single change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuning.journal import JOURNAL_FILE, Journal, Trial, read_trials
from tuning.space import Point

POINT: Point = {"sources": ("1", "2"), "transfer.beta": 0.03, "arm": None, "data.mix_with": ()}


def test_every_change_is_on_disk_at_once(tmp_path: Path) -> None:
    folder = str(tmp_path / "search")
    assert read_trials(folder) == ()
    journal = Journal(folder)
    first = journal.add(0, POINT, 5)
    assert first == Trial(number=0, point_number=0, point=POINT, seed=5)
    assert read_trials(folder) == (first,)
    second = journal.add(0, POINT, 6)
    assert (second.number, second.point_number) == (1, 0)
    changed = journal.note(0, state="stopped", reason="asha at 4")
    assert (changed.state, changed.reason, changed.failures) == ("stopped", "asha at 4", 0)
    journal.note(1, failures=2)
    again = Journal(folder)
    assert read_trials(folder) == tuple(again.trials) == tuple(journal.trials)
    assert [trial.failures for trial in again.trials] == [0, 2]
    assert again.add(1, {}, 5).number == 2, "numbers go on"


def test_sets_of_sources_are_tuples_again(tmp_path: Path) -> None:
    Journal(str(tmp_path)).add(0, POINT, 0)
    (trial,) = read_trials(str(tmp_path))
    assert trial.point == POINT and isinstance(trial.point["sources"], tuple)


def test_the_caller_s_point_is_copied(tmp_path: Path) -> None:
    point = {"beta": 1.0}
    trial = Journal(str(tmp_path)).add(0, point, 0)
    point["beta"] = 2.0
    assert trial.point == {"beta": 1.0}


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"trials": [{"number": 0}]}', '{"trials": [{"number": 0, "at": 1}]}']
)
def test_a_journal_of_another_version_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / JOURNAL_FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"{JOURNAL_FILE} is not a journal of this version"):
        Journal(str(tmp_path))


def test_rows_are_for_people_too(tmp_path: Path) -> None:
    Journal(str(tmp_path)).add(0, POINT, 3)
    (row,) = json.loads((tmp_path / JOURNAL_FILE).read_text())["trials"]
    assert row == {
        "number": 0,
        "point_number": 0,
        "point": {"sources": ["1", "2"], "transfer.beta": 0.03, "arm": None, "data.mix_with": []},
        "seed": 3,
        "state": "open",
        "reason": None,
        "failures": 0,
    }
