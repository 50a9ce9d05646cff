"""The ledger's page and table: the right verdict, every number, whatever arms there are; and the
check that finds every number that is not what was predicted.

Legend: S seeds, N sequences, T lead time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluated_runs import PageText, radar_result, result
from tests.unit.test_evaluate_commands import write_network
from tmu_dist.evaluate import evaluate_model
from tmu_dist.evaluation.predictions import PREDICTIONS_NAME
from tmu_dist.evaluation.result import JSON_NAME, MODEL, EvaluationResult, TransferGates
from tmu_dist.evaluation.score_table import Scores
from tmu_dist.ledger.findings import CONTROLS, find
from tmu_dist.ledger.page import (
    PAGE_FILE,
    RESULTS_FILE,
    TABLE_FILE,
    check_ledger,
    verdict,
    write_ledger,
)
from tmu_dist.ledger.records import EVALUATION_FOLDER, ArmRecord, Ledger, SeedRecord, load, save

SEEDS = (0, 1, 2)
N, T = 60, 3
MSE = {
    "scratch": 33.0,
    "scratch-longer": 32.4,
    "tmu-scratch": 32.9,
    "finetune-1": 32.2,
    "finetune-2": 31.4,
    "l2sp-1": 32.6,
    "l2sp-2": 31.9,
    "knowledge-flow": 31.6,
    "art": 33.2,
    "distillation": 31.8,
    "tmu-alone-1": 31.5,
    "tmu-alone-2": 30.6,
    "tmu": 30.0,
    "tmu-without-1": 30.6,
    "tmu-without-2": 31.5,
    "tmu-beta-0": 32.9,
    "tmu-shuffled": 32.7,
    "tmu-random-weights": 32.8,
}
"""Mean MSE per frame of every arm of two sources; equal numbers are one run."""
ARMS = {
    "scratch": ("from scratch", "baseline", "scratch", ()),
    "scratch-longer": ("from scratch, 2.41 times the iterations", "baseline", "scratch", ()),
    "tmu-scratch": ("TMU network without teachers", "baseline", "tmu_scratch", ()),
    "finetune-1": ("finetune", "start", "finetune", ("1",)),
    "finetune-2": ("finetune", "start", "finetune", ("2",)),
    "l2sp-1": ("L2-SP", "start", "l2_sp", ("1",)),
    "l2sp-2": ("L2-SP", "start", "l2_sp", ("2",)),
    "knowledge-flow": ("Knowledge Flow", "features", "knowledge_flow", ("1", "2")),
    "art": ("ART", "features", "art", ("1", "2")),
    "distillation": ("feature distillation", "features", "distillation", ("1", "2")),
    "tmu-alone-1": ("memory transfer", "subset", "tmu", ("1",)),
    "tmu-alone-2": ("memory transfer", "subset", "tmu", ("2",)),
    "tmu": ("memory transfer", "memory", "tmu", ("1", "2")),
    "tmu-without-1": ("memory transfer without 1", "subset", "tmu", ("2",)),
    "tmu-without-2": ("memory transfer without 2", "subset", "tmu", ("1",)),
    "tmu-beta-0": ("TMU, beta = 0", "control", "tmu", ("1", "2")),
    "tmu-shuffled": ("TMU, shuffled teachers", "control", "tmu", ("1", "2")),
    "tmu-random-weights": ("TMU, untrained teachers", "control", "tmu", ("1", "2")),
}  # fmt: skip
ONE_RUN = {"tmu-without-1": "tmu-alone-2", "tmu-without-2": "tmu-alone-1"}


def evaluation(name: str, seed: int, mse: float) -> EvaluationResult:
    """Scores around a mean: sequences differ much, seeds a little, the rest is noise."""
    shared, own = np.random.default_rng(1), np.random.default_rng((list(ARMS).index(name), seed))
    hard_N1 = shared.normal(0, 6, (N, 1))
    mse_NT = mse + hard_N1 + own.normal(0, 0.15) + own.normal(0, 0.8, (N, T))
    template = result(name, mse)
    values = dict(template.per_sequence[MODEL].values_NT)  # type: ignore[index]
    values = {key: np.full((N, T), 0.5) for key in values}
    values |= {"mse_per_frame": mse_NT, "mae_per_frame": 2.5 * mse_NT, "ssim": 1 - mse_NT / 60}
    scores = Scores(np.arange(N), values)
    sources = ARMS[name][3]
    means = {"1": 0.41, "2": 0.58}
    own_gates = tuple(means[source] + own.normal(0, 0.01) for source in sources)
    return replace(
        template,
        model=replace(template.model, seed=seed),
        data=replace(template.data, num_sequences=N),
        overall={**template.overall, MODEL: scores.overall()},
        per_lead_time={**template.per_lead_time},
        per_sequence={MODEL: scores},
        gates=TransferGates(teachers=sources, layers=(0,), means_LM=(own_gates,))
        if ARMS[name][2] == "tmu"
        else None,
    )


def fake_ledger(
    mse: Mapping[str, float] = MSE, *, seeds: Sequence[int] = SEEDS, **changes: Any
) -> Ledger:
    """A ledger of two sources with known means; arms that `mse` leaves out have no run."""

    def records(name: str) -> dict[int, SeedRecord]:
        if name not in mse:
            return {}
        run = ONE_RUN.get(name, name)
        # With beta = 0 the same bits as without teachers, as it must be.
        drawn = "tmu-scratch" if name == "tmu-beta-0" else run
        return {
            seed: SeedRecord(
                run=f"runs/{run}-seed{seed}",
                evaluation=evaluation(drawn, seed, mse[name]),
                seconds_per_batch=0.123 + 0.01 * seed,
            )
            for seed in seeds
        }

    arms = tuple(
        ArmRecord(
            name=name, label=label, group=group, method=method, sources=sources,  # type: ignore[arg-type]
            seeds=records(name), failures={},
        )
        for name, (label, group, method, sources) in ARMS.items()
    )  # fmt: skip
    ledger = Ledger(
        recipe="digits-tmu",
        command="python -m tmu_dist.ledger --recipe digits-tmu --seeds 0 1 2",
        git_revision="abc1234",
        sources=("1", "2"),
        facts={
            "frame": [1, 32, 32], "cell": "convlstm", "num_layers": 2, "hidden_channels": 32,
            "num_steps": 500, "batch_size": 8,
        },
        arms=arms,
    )  # fmt: skip
    return replace(ledger, **changes)


@pytest.fixture(scope="module")
def whole() -> Ledger:
    return fake_ledger()


@pytest.fixture(scope="module")
def page(whole: Ledger, tmp_path_factory: pytest.TempPathFactory) -> PageText:
    folder = tmp_path_factory.mktemp("ledger")
    write_ledger(folder, whole)
    return PageText((folder / PAGE_FILE).read_text())


def row(page: PageText, *first: str) -> list[str]:
    return next(cells for cells in page.rows if cells[: len(first)] == list(first))


def means(name: str, metric: str = "mse_per_frame") -> list[float]:
    """Of each seed, from the same random numbers."""
    return [evaluation(name, seed, MSE[name]).overall[MODEL][metric] for seed in SEEDS]


def test_the_first_table_has_every_arm_once_with_its_spread(page: PageText) -> None:
    table = page.rows[1 : 3 + len(ARMS) - len(ONE_RUN)]
    names = [(cells[0], cells[1]) for cells in table]
    expected = [("persistence", "none")] + [
        (label, ", ".join(sources) or "none")
        for name, (label, _, _, sources) in ARMS.items()
        if name not in ONE_RUN
    ]
    assert names[: len(expected)] == expected
    cells = row(page, "memory transfer", "1, 2")
    mse, ssim = np.array(means("tmu")), np.array(means("tmu", "ssim"))
    assert cells[2:6] == ["9.53 M", "3.59 M", "0.133", "17.7"]
    assert cells[6] == f"{mse.mean():.1f} ± {mse.std(ddof=1):.1f}"
    assert cells[8:] == [f"{ssim.mean():.3f} ± {ssim.std(ddof=1):.3f}", "3"]
    assert set(page.best) == {"memory transfer"}


def test_the_papers_values_stand_beside_arms_that_it_has(page: PageText, tmp_path: Path) -> None:
    beside = [cells for cells in page.rows if len(cells) == 10 and "M / " in cells[8]]
    paper = {(c[0], c[1]): (c[3], c[5], c[7], c[9]) for c in beside}
    assert len(paper) == 11
    assert paper["ART", "1, 2"] == ("105.0", "0.871", "0.734", "10.1 M / 10.1 M")
    assert paper["memory transfer", "1"] == ("96.1", "0.798", "0.762", "–")
    assert "80,000 iterations" in page.text
    assert not {"TMU, beta = 0", "from scratch, 2.41 times the iterations"} & {n for n, _ in paper}
    few = {name: MSE[name] for name in ("scratch", "tmu")}
    write_ledger(tmp_path, fake_ledger(few, recipe="digits-mim-tmu"))
    assert "80,000 iterations" not in (tmp_path / PAGE_FILE).read_text()


def test_differences_from_scratch_are_paired_by_seed(page: PageText) -> None:
    cells = next(c for c in page.rows if c[0] == "finetune (2)")
    by_seed = np.subtract(means("finetune-2"), means("scratch"))
    assert cells[1] == f"{by_seed.mean():+.2f}".replace("-", "−")
    assert cells[4] == ", ".join(f"{value:+.2f}" for value in by_seed).replace("-", "−")


def test_sources_are_told_apart(page: PageText, whole: Ledger) -> None:
    """Contribution: of source 1, the error of 2 alone less that of both; gates as drawn."""
    cells = next(c for c in page.rows if c[0] == "2" and c[-1] == "helps")
    without = np.mean(np.subtract(means("tmu-alone-1"), means("tmu")))
    alone = np.mean(np.subtract(means("tmu-scratch"), means("tmu-alone-2")))
    assert (cells[1], cells[4]) == (f"{without:+.2f}", f"{alone:+.2f}")
    assert cells[6].startswith("0.58")
    assert find(whole).gate_relation is None
    assert "2 sources are too few for a correlation" in page.text


def test_other_programs_get_every_number(tmp_path: Path, whole: Ledger) -> None:
    write_ledger(tmp_path, whole)
    record = json.loads((tmp_path / RESULTS_FILE).read_text())
    runs = record["arms"]["finetune-2"]["runs"]
    assert [runs[str(s)]["scores"]["mse_per_frame"] for s in SEEDS] == pytest.approx(
        means("finetune-2")
    )
    without = record["differences"]["mse_per_frame"]["sources"]["2"]["contribution"]
    assert without["by_seed"] == pytest.approx(np.subtract(means("tmu-alone-1"), means("tmu")))
    assert without["flag"] == "helps" and record["answer"] == "knowledge"
    assert record["same_bits"] is True and len(record["gates"]["1"]) == len(SEEDS)


def test_the_page_is_whole(page: PageText) -> None:
    assert not page.open_tags
    assert all(address.startswith("data:") for address in page.addresses)
    for words in ("Student's t", "no benchmark", "at 95 %", "python -m tmu_dist.ledger check",
                  "to the last bit: yes", "lower is better", "negative transfer"):  # fmt: skip
        assert words in page.text, words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "It is the teachers' knowledge that helps"),
        ({"tmu-shuffled": 29.0}, "it is not shown to beat “TMU, shuffled teachers”."),
        ({"tmu-scratch": 29.9, "tmu-beta-0": 29.9}, "beat “TMU network without teachers”, “TMU, b"),
        ({"scratch": 30.0}, "there is no gain to explain"),
        ({"scratch": 25.0}, "Memory transfer is worse than training from scratch"),
        ({"tmu-random-weights": None}, "open without “TMU, untrained teachers”"),
        ({"scratch": None}, "No answer"),
    ],
)
def test_the_verdict_is_in_words(changes: dict[str, float | None], words: str) -> None:
    mse = {name: m for name, value in MSE.items() if (m := changes.get(name, value)) is not None}
    ledger = fake_ledger(mse)
    assert words in verdict(ledger, find(ledger))[0]


def test_the_least_gain_is_named(whole: Ledger) -> None:
    second = verdict(whole, find(whole))[1]
    gains = {name: np.mean(means(name)) - np.mean(means("tmu")) for name in CONTROLS}
    assert min(gains, key=gains.__getitem__) == "scratch-longer"
    assert f"“from scratch, 2.41 times the iterations”: {gains['scratch-longer']:+.2f}" in second


def test_nothing_is_concluded_where_seeds_alone_are_unsure() -> None:
    """Seeds that gain +3.4, +0.2 and +1.8 over shuffled teachers: above zero, far apart."""
    ledger = fake_ledger()
    arm = ledger.arm("tmu-shuffled")
    assert arm is not None
    moved = {
        seed: replace(record, evaluation=evaluation("tmu-shuffled", seed, 30.0 + shift))
        for (seed, record), shift in zip(arm.seeds.items(), (3.4, 0.6, 1.8))
    }
    arms = tuple(replace(a, seeds=moved) if a is arm else a for a in ledger.arms)
    findings = find(replace(ledger, arms=arms))
    over_shuffled = findings.main.controls["tmu-shuffled"]
    assert over_shuffled is not None and over_shuffled.low > 0
    first, _ = verdict(ledger, findings)
    assert first.endswith("not shown to beat “TMU, shuffled teachers”.")
    assert verdict(ledger, find(ledger))[0].startswith("It is the teachers' knowledge that helps")


def test_broken_zero_weight_is_seen(whole: Ledger) -> None:
    assert find(whole).same_bits is True
    arm = whole.arm("tmu-beta-0")
    assert arm is not None
    record = arm.seeds[1]
    scores = record.evaluation.per_sequence[MODEL]  # type: ignore[index]
    mse_NT = scores.values_NT["mse_per_frame"].copy()
    mse_NT[5, 1] = np.nextafter(mse_NT[5, 1], np.inf)
    changed = Scores(scores.sample_ids_N, {**scores.values_NT, "mse_per_frame": mse_NT})
    other = replace(record, evaluation=replace(record.evaluation, per_sequence={MODEL: changed}))
    broken = replace(arm, seeds={**arm.seeds, 1: other})
    arms = tuple(broken if each.name == arm.name else each for each in whole.arms)
    assert find(replace(whole, arms=arms)).same_bits is False


def test_one_seed_has_no_spread_and_decides_nothing(tmp_path: Path) -> None:
    few = {name: MSE[name] for name in ("scratch", "tmu", "tmu-alone-1", "tmu-without-2")}
    write_ledger(tmp_path, fake_ledger(few, seeds=(4,)))
    page = PageText((tmp_path / PAGE_FILE).read_text())
    assert "Undecided: one seed ranks nothing." in page.text and "There is one seed" in page.text
    assert row(page, "memory transfer", "1, 2")[6].count("±") == 0
    assert "helps" not in [cells[-1] for cells in page.rows]


@pytest.mark.parametrize("kept", [["tmu"], ["scratch", "art"], ["tmu-alone-1", "tmu-scratch"]])
def test_partial_ledgers_have_a_page(kept: list[str], tmp_path: Path) -> None:
    ledger = fake_ledger({name: MSE[name] for name in kept}, seeds=(0, 1))
    failed = replace(ledger.arms[4], failures={1: "RuntimeError: <too hot>"})
    ledger = replace(ledger, arms=(*ledger.arms[:4], failed, *ledger.arms[5:]))
    write_ledger(tmp_path, ledger)
    page = PageText((tmp_path / PAGE_FILE).read_text())
    assert "finetune-2, seed 1: RuntimeError: <too hot>" in page.text
    assert "Not run yet: " in page.text
    for name in kept:
        assert row(page, ARMS[name][0], ", ".join(ARMS[name][3]) or "none")[-1] == "2"


def test_an_empty_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one evaluated run"):
        write_ledger(tmp_path, fake_ledger({}))


def test_four_sources_make_a_correlation() -> None:
    """Open gates and large contributions go together by construction."""
    sources = ("a", "b", "c", "d")
    worth = dict(zip(sources, (0.5, 1.0, 1.5, 3.0)))

    def arm(name: str, group: str, used: tuple[str, ...], mse: float) -> ArmRecord:
        means_M = tuple(worth[source] / 4 for source in used)
        gates = TransferGates(teachers=used, layers=(0,), means_LM=(means_M,))
        own = replace(evaluation("tmu", 0, mse), gates=gates)
        record = SeedRecord(run=name, evaluation=own, seconds_per_batch=1.0)
        return ArmRecord(
            name=name, label=name, group=group, method="tmu", sources=used, seeds={0: record},  # type: ignore[arg-type]
            failures={},
        )  # fmt: skip

    rest = [tuple(s for s in sources if s != left) for left in sources]
    arms = [arm("tmu", "memory", sources, 20.0)]
    arms += [arm(f"no-{s}", "subset", r, 20.0 + worth[s]) for s, r in zip(sources, rest)]
    found = find(fake_ledger({}, sources=sources, arms=tuple(arms)))
    contributions = [found.main.sources[s].contribution for s in sources]
    assert [c and round(c.mean, 9) for c in contributions] == list(worth.values())
    assert found.gate_relation is not None
    assert found.gate_relation == pytest.approx((1.0, 1.0), abs=1e-12)


def test_radar_is_compared_by_csi_too(tmp_path: Path) -> None:
    """Counts of each sequence: TMU has 70 hits of 130, scratch 55 of 145."""

    def arm(name: str, hits: int) -> ArmRecord:
        base = radar_result(name, hits=hits)
        counts_NTKX = np.zeros((40, 3, 2, 4), np.int64)
        counts_NTKX[..., 0, :] = hits, 100 - hits, 100 - hits, 800 + hits
        own = replace(base, per_sequence=base.per_sequence, contingency={MODEL: counts_NTKX})
        seeds = {
            s: SeedRecord(run=f"{name}{s}", evaluation=own, seconds_per_batch=1.0) for s in (0, 1)
        }
        label, group, method, sources = ARMS[name]
        return ArmRecord(
            name=name, label=label, group=group, method=method, sources=sources, seeds=seeds,  # type: ignore[arg-type]
            failures={},
        )  # fmt: skip

    arms = (arm("scratch", 55), arm("tmu", 70))
    write_ledger(tmp_path, fake_ledger(arms=arms, recipe="radar-tmu"))
    page = PageText((tmp_path / PAGE_FILE).read_text())
    assert row(page, "memory transfer", "1, 2")[9] == f"{70 / 130:.3f} ± 0.000"
    csi = next(f for f in find(fake_ledger(arms=arms)).scores if f.score.name == "csi")
    gained = csi.controls["scratch"]
    assert gained is not None and gained.mean == pytest.approx(70 / 130 - 55 / 145)
    assert gained.flag == "helps"
    assert row(page, "optical flow")[9] == f"{70 / 130:.3f}"


@pytest.fixture(scope="module")
def checked(archive_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms whose predictions were made by networks, with their page."""
    folder = tmp_path_factory.mktemp("checked")
    arms = []
    for name in ("scratch", "tmu"):
        run = folder / "runs" / name
        run.parent.mkdir(exist_ok=True)
        write_network(run, archive_url)
        place = run / EVALUATION_FOLDER
        evaluate_model(
            str(run), archive_url, predictions_to=place / PREDICTIONS_NAME, batch_size=2
        ).save(place)
        (run / "result.json").write_text(json.dumps({"seconds_per_batch": 0.5}))
        own = SeedRecord(
            run=f"runs/{name}", evaluation=EvaluationResult.load(place), seconds_per_batch=0.5
        )
        label, group, method, sources = ARMS[name]
        arms.append(
            ArmRecord(
                name=name, label=label, group=group, method=method, sources=sources,  # type: ignore[arg-type]
                seeds={0: own}, failures={},
            )
        )  # fmt: skip
    save(fake_ledger(arms=tuple(arms)), folder)
    write_ledger(folder, load(folder))
    return folder


@pytest.fixture
def copy(checked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checked, tmp_path / "copy"))


def test_a_true_ledger_passes(checked: Path) -> None:
    assert check_ledger(checked) == []


def test_a_changed_prediction_is_found(copy: Path) -> None:
    path = copy / "runs" / "tmu" / EVALUATION_FOLDER / PREDICTIONS_NAME
    frames_NTCHW = np.load(path, mmap_mode="r+")
    frames_NTCHW[2, 1] += 0.5
    frames_NTCHW.flush()
    problems = check_ledger(copy)
    assert any("runs/tmu: mse_per_frame of 1 frames differs, first of sequence 2, lead time 2" in p
               for p in problems)  # fmt: skip
    assert any("average ssim" in p for p in problems)
    assert any("table.md: tmu shows MSE / frame" in p for p in problems)
    assert not any("runs/scratch" in p for p in problems)


def test_a_changed_average_is_found(copy: Path) -> None:
    path = copy / "runs" / "tmu" / EVALUATION_FOLDER / JSON_NAME
    report = json.loads(path.read_text())
    report["overall"][MODEL]["mae_per_frame"] *= 1 + 3e-6
    path.write_text(json.dumps(report))
    (problem,) = check_ledger(copy)
    assert "runs/tmu: average mae_per_frame: recorded" in problem


def test_a_changed_table_is_found(copy: Path) -> None:
    table = copy / TABLE_FILE
    text = table.read_text()
    line = next(line for line in text.splitlines() if line.startswith("| memory transfer | 1, 2"))
    shown = line.split("|")[7].strip().strip("*")
    changed = line.replace(shown, f"{float(shown) - 0.1:.1f}")
    table.write_text(text.replace(line, changed, 1))
    problems = check_ledger(copy)
    assert len(problems) == 2 and "is not of these records" in problems[0]
    assert f"tmu shows MSE / frame {float(shown) - 0.1:.1f}" in problems[1]
    table.unlink()
    assert "is missing" in check_ledger(copy)[0]


def test_lost_predictions_are_named(copy: Path) -> None:
    (copy / "runs" / "scratch" / EVALUATION_FOLDER / PREDICTIONS_NAME).unlink()
    (problem,) = check_ledger(copy)
    assert problem.startswith("runs/scratch: ") and "--keep-predictions" in problem
