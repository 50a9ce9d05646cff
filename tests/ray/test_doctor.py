"""The doctor on a real Ray: it passes a healthy cluster, and names each planted fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ray.conftest import on_ray
from tmu_dist.config import PlacementConfig, RunConfig
from tmu_dist.config.run import to_json
from tmu_dist.data import storage
from tmu_dist.doctor import __main__ as command
from tmu_dist.doctor.findings import CHECKS

pytestmark = [pytest.mark.ray]

Doctor = Callable[[RunConfig], tuple[int, dict[str, Any]]]


@pytest.fixture
def flags(tmp_path: Path) -> Callable[[RunConfig], list[str]]:
    def flags_of(config: RunConfig) -> list[str]:
        file = tmp_path / f"{Path(config.output).name}.yaml"
        file.write_text(yaml.safe_dump(json.loads(to_json(config))))
        return ["--json", "--recipe", "digits-scratch", "--config", str(file)]

    return flags_of


@pytest.fixture
def doctor(flags: Callable[[RunConfig], list[str]], capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Exit code and record for a run, from the command in this process."""

    def run(config: RunConfig) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code: Any = 0
        try:
            command.main(flags(config))
        except SystemExit as end:
            code = end.code
        return code, json.loads(capsys.readouterr().out)

    return run


def of(record: dict[str, Any], check: str, status: str) -> list[dict[str, Any]]:
    return [f for f in record["findings"] if (f["check"], f["status"]) == (check, status)]


def the_fault(record: dict[str, Any], check: str, *words: str) -> dict[str, Any]:
    """The one fault of a check that says these words; it says what to change, too."""
    told = [f for f in of(record, check, "fault") if all(word in f["found"] for word in words)]
    assert len(told) == 1, record["findings"]
    assert told[0]["advice"]
    return told[0]


@pytest.mark.usefixtures("ray_session")
def test_a_healthy_cluster_passes_and_keeps_nothing(tmu_config: RunConfig, doctor: Doctor) -> None:
    config = on_ray(tmu_config, 2, "healthy")
    code, record = doctor(config)
    assert (code, record["healthy"], record["nodes"]) == (0, True, 1), record
    assert {finding["check"] for finding in record["findings"]} == set(CHECKS)
    assert not [f for f in record["findings"] if f["status"] == "fault"]
    for check in ("versions", "clock", "token", "storage", "exchange", "teachers", "step"):
        assert of(record, check, "ok"), record["findings"]
    assert record["versions"]["torch"]
    assert {"nodes", "ranks"} <= set(record["seconds"])
    assert not Path(config.output).exists()


@pytest.mark.usefixtures("ray_session")
def test_what_cannot_be_read_or_written_is_named_at_once(
    tmu_config: RunConfig,
    doctor: Doctor,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("no_proxy", "*")
    config = replace(
        on_ray(tmu_config, 1, "broken"),
        output=str(tmp_path / "file" / "run"),
        data=replace(
            tmu_config.data,
            mix_with=("s3://no-such-bucket-anywhere/archive",),
            cache_folder=str(tmp_path / "file"),
        ),
        transfer=replace(
            tmu_config.transfer, teachers=(tmu_config.transfer.teachers[0], f"{bucket}/nobody")
        ),
    )
    code, record = doctor(config)
    assert (code, record["healthy"]) == (1, False)
    the_fault(record, "storage", "data.mix_with", "no-such-bucket-anywhere")
    the_fault(record, "storage", "output", "file/run")
    the_fault(record, "cache", str(tmp_path / "file"))
    the_fault(record, "teachers", f"{bucket}/nobody")
    assert of(record, "exchange", "skipped")
    assert of(record, "step", "skipped"), record["findings"]


def damaged(config: RunConfig, folder: Path) -> RunConfig:
    """The run with a copy of its archive in which a byte of the first shard differs."""
    for path in storage.list_paths(config.data.url):
        storage.write_bytes(str(folder), path, storage.read_bytes(config.data.url, path))
    shard = folder / "train" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    return replace(config, data=replace(config.data, url=str(folder)))


def test_what_does_not_fit_or_is_damaged_is_named_in_one_process(
    tmu_config: RunConfig, doctor: Doctor, tmp_path: Path
) -> None:
    unfit = replace(tmu_config, model=replace(tmu_config.model, hidden_channels=6))
    code, record = doctor(unfit)
    assert code == 1
    the_fault(record, "teachers", "hidden channels: teacher 4, student 6")

    small = replace(tmu_config, placement=PlacementConfig(memory_gib=1e-6))
    code, record = doctor(small)
    assert code == 1
    the_fault(record, "teachers", "memory_gib")

    code, record = doctor(damaged(tmu_config, tmp_path / "archive"))
    assert code == 1
    the_fault(record, "storage", "shard-000000.tar", "damaged")


@pytest.fixture
def open_ray() -> Iterator[str]:
    """A Ray of another process that asks for no token, and promises a GPU; its address."""
    script = (
        "import sys, ray\n"
        "ray.init(address='local', num_cpus=1, num_gpus=1, include_dashboard=False,"
        " log_to_driver=False)\n"
        "print(ray.get_runtime_context().gcs_address, flush=True)\n"
        "sys.stdin.read()\n"
    )
    settings = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    ray = subprocess.Popen(
        [sys.executable, "-c", script],
        env=settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert ray.stdin is not None and ray.stdout is not None
    with closing(ray.stdin):
        yield ray.stdout.readline().strip()
    ray.wait(60)


def test_an_open_cluster_and_gpus_that_are_not_there(
    tmu_config: RunConfig, flags: Callable[[RunConfig], list[str]], open_ray: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tmu_dist.doctor", *flags(on_ray(tmu_config, 1, "open"))],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": open_ray},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    record = json.loads(done.stdout)
    the_fault(record, "token", open_ray, "no token")
    gpus = the_fault(record, "gpus", "promises 1 GPUs, torch sees 0")
    assert gpus["where"] == open_ray.rpartition(":")[0]
