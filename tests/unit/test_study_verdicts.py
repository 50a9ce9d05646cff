"""Verdicts on planted numbers: what holds, what is turned round, what these runs leave open."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.study_records import as_published, fake_ledger
from tmu_dist.ledger.records import Ledger
from tmu_dist.ledger.statistics import Difference
from tmu_dist.study.design import Study
from tmu_dist.study.studies import STUDIES
from tmu_dist.study.verdicts import Findings, find, judge_alike, judge_better, together

TABLE_1 = STUDIES["table1"]


def verdicts(study: Study, ledger: Ledger) -> dict[str, str]:
    return {found.claim.key: found.verdict for found in find(study, ledger).claims}


def found(mean: float, low: float, high: float, half: float | None = 0.1) -> Difference:
    return Difference(
        seeds=(0, 1), by_seed=(mean, mean), mean=mean, low=low, high=high,
        student=None if half is None else (mean - half, mean + half),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (found(1, 0.5, 1.5), "holds"),
        (found(-1, -1.5, -0.5), "opposite"),
        (found(1, -0.1, 2), "undecided"),
        (found(1, 0.5, 1.5, half=2), "undecided"),
        (found(1, 0.5, 1.5, half=None), "undecided"),
        (None, "not run"),
    ],
)
def test_a_pair_takes_both_intervals(gain: Difference | None, verdict: str) -> None:
    assert judge_better(gain) == verdict


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (found(0.2, -0.3, 0.7), "holds"),
        (found(0.9, 0.5, 1.3), "undecided"),
        (found(3, 2.5, 3.5), "opposite"),
        (found(-3, -3.5, -2.5), "opposite"),
        (found(0.2, -0.3, 0.7, half=2), "undecided"),
        (found(0.2, -0.3, 0.7, half=None), "undecided"),
        (None, "not run"),
    ],
)
def test_alike_is_shown_and_not_assumed(gain: Difference | None, verdict: str) -> None:
    assert judge_alike(gain, margin=1.0) == verdict


def test_all_pairs_must_hold() -> None:
    assert together(["holds", "holds"]) == "holds"
    assert together(["holds", "undecided"]) == "undecided"
    assert together(["undecided", "not run", "holds"]) == "not run"
    assert together(["holds", "opposite", "not run", "undecided"]) == "opposite"


@pytest.mark.parametrize("name", ["table1", "table2", "table3"])
def test_the_papers_own_values_bear_out_the_papers_claims(name: str) -> None:
    study = STUDIES[name]
    means = as_published(study)
    if name == "table3":  # of which the text has SSIM alone
        means["convlstm/tmu-kth"] = 450.0
    findings = find(study, fake_ledger(study, means))
    assert {each.verdict for each in findings.claims} == {"holds"}
    first = [each for each in findings.orderings if each.score == "mse_per_frame"]
    assert len(first) == len(study.groups)
    assert all(each.tau > 0.95 and not each.opposite for each in first)


def test_what_is_turned_round_is_said_so() -> None:
    means = as_published(TABLE_1) | {"art": 90.0}
    assert verdicts(TABLE_1, fake_ledger(TABLE_1, means)) == {
        "helps": "holds",
        "beats-others": "opposite",
        "knowledge": "holds",
        "parameters": "holds",
        "one-source": "holds",
        "two-sources": "holds",
    }
    findings = find(TABLE_1, fake_ledger(TABLE_1, means))
    mse = next(each for each in findings.orderings if each.score == "mse_per_frame")
    assert ("tmu", "art") in mse.opposite and mse.verdict == "opposite" and 0 < mse.tau < 1


def test_seeds_that_differ_leave_it_open() -> None:
    means = {**as_published(TABLE_1), "tmu": 96.0, "tmu-1": 96.1, "tmu-2": 97.0}
    found = verdicts(TABLE_1, fake_ledger(TABLE_1, means, noise=4.0))
    assert found["two-sources"] == "undecided"
    one_seed = verdicts(TABLE_1, fake_ledger(TABLE_1, as_published(TABLE_1), seeds=(0,)))
    assert {*one_seed.values()} == {"undecided"}


def test_a_larger_network_that_is_better_is_not_alike() -> None:
    means = as_published(TABLE_1) | {"tmu-scratch": 100.0}
    assert verdicts(TABLE_1, fake_ledger(TABLE_1, means))["parameters"] == "opposite"


def test_rows_without_runs_are_not_judged() -> None:
    means = {key: mse for key, mse in as_published(TABLE_1).items() if key != "art"}
    found = verdicts(TABLE_1, fake_ledger(TABLE_1, means))
    assert (found["helps"], found["beats-others"]) == ("holds", "not run")


@pytest.fixture
def gates() -> Findings:
    study = STUDIES["table5"]
    keys = {row.key: 80.0 for row in study.rows}
    opened = {"mch": 0.61, "fmi": 0.60, "mnist2": 0.43, "kth": 0.60}
    return find(study, fake_ledger(study, keys, gates=opened))


def test_gates_are_compared_over_seeds(gates: Findings) -> None:
    (relevance,) = gates.claims
    pairs = {(pair.better, pair.worse): pair for pair in relevance.pairs}
    assert pairs["mch", "mnist2"].verdict == "holds"
    gain = pairs["mch", "mnist2"].gain
    assert gain is not None and gain.mean == pytest.approx(0.18, abs=0.01)
    assert pairs["fmi", "kth"].verdict == "undecided" == relevance.verdict


def test_radar_is_judged_by_csi_too() -> None:
    study = STUDIES["table4"]
    findings = find(study, fake_ledger(study, as_published(study), is_radar=True))
    assert {*findings.scores} == {"mse_per_frame", "mae_per_frame", "csi"}
    helps = next(each for each in findings.claims if each.claim.key == "helps")
    assert {pair.score: pair.verdict for pair in helps.pairs} == {
        "mse_per_frame": "holds",
        "mae_per_frame": "holds",
        "csi": "holds",
    }


def test_runs_of_other_data_are_not_compared() -> None:
    ledger = fake_ledger(TABLE_1, as_published(TABLE_1))
    record = ledger.arms[0].seeds[0]
    data = replace(record.evaluation.data, manifest_hash="0" * 64)
    other = replace(record, evaluation=replace(record.evaluation, data=data))
    arm = replace(ledger.arms[0], seeds={0: other})
    with pytest.raises(ValueError, match="cannot be compared, their archive"):
        find(TABLE_1, replace(ledger, arms=(arm, *ledger.arms[1:])))
