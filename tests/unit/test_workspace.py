"""Where relative paths start: here, or, in a Ray job, in the workspace."""

from __future__ import annotations

from pathlib import Path

import pytest

from tmu_dist.data.storage import join_url, local_path, write_bytes
from tmu_dist.recipes import get_recipe
from tmu_dist.training.launch import absolute
from tmu_dist.workspace import WORKSPACE, in_workspace, located


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own; no workspace is named."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(WORKSPACE, raising=False)
    return tmp_path / "home"


@pytest.fixture
def job(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is the copy of a working directory, as Ray makes it."""
    folder = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_outside_of_jobs_paths_mean_themselves(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert located("runs/a") == in_workspace("runs/a") == "runs/a"
    assert absolute("runs/a") == str(tmp_path / "runs/a")
    monkeypatch.setenv(WORKSPACE, "s3://bucket/tmu/")
    assert located("runs/a") == "runs/a"  # a user who types it means this folder
    assert in_workspace("runs/a") == "s3://bucket/tmu/runs/a"


def test_in_a_job_relative_paths_outlive_it(home: Path, job: Path) -> None:
    assert local_path("runs/a") == home / "tmu_dist/runs/a"
    write_bytes("runs/a", "b.txt", b"kept")
    assert (home / "tmu_dist/runs/a/b.txt").read_bytes() == b"kept"
    assert get_recipe("digits-tmu").config.output == absolute("runs/digits-tmu")
    assert not any(job.iterdir())


def test_in_a_job_with_a_bucket_for_workspace(
    home: Path, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WORKSPACE, "s3://bucket/tmu/")
    assert local_path("runs/a") is None
    assert absolute("runs/a/") == "s3://bucket/tmu/runs/a"
    assert join_url("runs/a", "log.jsonl") == "s3://bucket/tmu/runs/a/log.jsonl"


@pytest.mark.parametrize("address", ["/data/a", "~/a", "s3://bucket/a", "file:///data/a"])
def test_whole_addresses_mean_themselves_everywhere(home: Path, job: Path, address: str) -> None:
    assert located(address) == address


def test_a_whole_path_does_not_ask_where_this_process_is(job: Path) -> None:
    job.rmdir()
    with pytest.raises(FileNotFoundError):
        Path.cwd()
    assert located("/data/a") == "/data/a"
    assert local_path("/data/a") == Path("/data/a")
