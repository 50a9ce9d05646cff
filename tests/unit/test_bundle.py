"""A crash leaves what a bug report needs, without secrets, and is not hidden by it."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tmu_dist import bundle
from tmu_dist.collectives import Collectives
from tmu_dist.config import ConfigError, RunConfig
from tmu_dist.data import storage
from tmu_dist.recipes.base import Recipe
from tmu_dist.run_folder import CRASH_FOLDER, read_json
from tmu_dist.train import run_recipe
from tmu_dist.training import loop
from tmu_dist.training.loop import NonFiniteLossError
from tmu_dist.training.stopping import RunStoppedError
from tmu_dist.transfer.base import DeadDistillationError

PARTS = {
    *("config.json", "run.json", "error.txt", "command.json", "packages.txt", "environment.txt"),
    *("machine.json", "gpus.txt", "ray.json", "log.jsonl", "ranks.txt"),
}


def unzipped(run: str, path: str) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(storage.read_bytes(run, path))) as content:
        return {name: content.read(name).decode() for name in content.namelist()}


def bundles(run: str) -> dict[str, dict[str, str]]:
    """Texts by name, by the path of their bundle."""
    return {path: unzipped(run, path) for path in storage.list_paths(run, CRASH_FOLDER)}


def dies(error: Exception) -> Callable[[loop.Run], None]:
    def die(run: loop.Run) -> None:
        raise error

    return die


def train(config: RunConfig) -> None:
    run_recipe(Recipe(config=config), Collectives())


@pytest.mark.parametrize("place", ["disk", "store"])
def test_a_crash_leaves_everything_and_is_raised(
    place: str,
    request: pytest.FixtureRequest,
    tiny_config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tiny_config
    if place == "store":
        config = replace(config, output=f"{request.getfixturevalue('bucket')}/run")
    monkeypatch.setattr(loop.Run, "validate", dies(DeadDistillationError("nothing is taught")))
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    with pytest.raises(DeadDistillationError) as raised:
        train(config)
    ((path, parts),) = bundles(config.output).items()
    assert set(parts) == PARTS
    assert json.loads(parts["config.json"])["output"] == config.output
    assert json.loads(parts["run.json"])["starts"][0]["world_size"] == 1
    assert "nothing is taught" in parts["error.txt"] and "in advance" not in parts["error.txt"]
    assert parts["error.txt"].startswith("Traceback")
    assert [json.loads(line)["step"] for line in parts["log.jsonl"].splitlines()][-1] == 3
    assert "== logs/rank-0000/" in parts["ranks.txt"] and "nothing is taught" in parts["ranks.txt"]
    assert "torch==" in parts["packages.txt"]
    assert "NCCL_SOCKET_IFNAME=eth7\n" in parts["environment.txt"]
    machine = json.loads(parts["machine.json"])
    assert machine["disks"] and machine["memory"][0].startswith("MemTotal")
    assert len(json.loads(parts["command.json"])["git_revision"]) >= 7
    assert f"{config.output}/{path}" in caplog.text
    assert any(path in note for note in raised.value.__notes__)


@pytest.mark.parametrize(
    ("error", "is_crash"),
    [
        (ConfigError("wrong"), False),
        (storage.MissingObjectError("no archive"), False),
        (RunStoppedError("asked"), False),
        (storage.StorageError("out of reach"), True),
        (NonFiniteLossError("nan"), True),
        (RuntimeError("connection closed by peer"), True),
        (KeyError("a bug"), True),
        (MemoryError(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_a_message_does_not_explain_leaves_one(
    error: Exception, is_crash: bool, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "_parts", lambda run, error: {})
    with pytest.raises(type(error)), bundle.bundle_on_crash(tiny_config):
        raise error
    assert len(bundles(tiny_config.output)) == is_crash
    with pytest.raises(type(error)), bundle.bundle_on_crash(tiny_config, is_main=False):
        raise type(error)("on another rank")
    assert len(bundles(tiny_config.output)) == is_crash


def test_a_value_that_our_code_refuses_is_explained_a_bug_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        read_json(tmp_path, "result.json")
    with pytest.raises(ValueError) as bug:
        json.loads("{")
    assert not bundle.is_crash(refused.value) and bundle.is_crash(bug.value)


def test_a_teacher_that_crashes_leaves_one_bundle(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "_parts", lambda run, error: {})
    teacher = replace(tiny_config, output=f"{tiny_config.output}-teacher")
    with (
        pytest.raises(KeyError),
        bundle.bundle_on_crash(tiny_config),
        bundle.bundle_on_crash(teacher),
    ):
        raise KeyError("a bug")
    assert len(bundles(teacher.output)) == 1 and not bundles(tiny_config.output)


SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00",
    "AWS_SECRET_ACCESS_KEY": 'planted/one+"two"',
    "AWS_SESSION_TOKEN": "planted-session",
    "RAY_AUTH_TOKEN": "planted-auth",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountKey=planted-azure;EndpointSuffix=x",
    "SOMEBODYS_API_KEY": "planted-of-no-prefix",
    "HTTPS_PROXY": "http://somebody:planted-proxy@proxy:3128",
    "HTTP_PROXY": "somebody:planted-bare@proxy:3128",
    "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(
        {"runtime_env": {"env_vars": {"WANDB_API_KEY": "planted in job", "PLAIN": "kept-1"}}}
    ),
    "RAY_NESTED": json.dumps({"inner": json.dumps({"password": "planted, nested"})}),
}
TEXTS = (
    "GET https://host/kept-2?X-Amz-Signature=planted-query&x=planted",
    "s3://user:planted-s3@host/kept-3",
    "Authorization: Bearer planted.planted.planted",
    "client_secret = 'planted in quotes', next=kept-4",
    "-----BEGIN RSA PRIVATE KEY-----\nplantedplanted\n-----END RSA PRIVATE KEY-----",
    "token: planted-free-text",
    "the url of planted-auth has planted/one%2B%22two%22 in it",
)


def test_no_secret_gets_out(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("planted-file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    output = tiny_config.output
    everything = "\n".join((*TEXTS, *SECRETS.values(), "planted-file")).encode()
    for file in ("run.json", "log.jsonl", "logs/rank-0000/1.txt"):
        storage.write_bytes(output, file, everything)
    data = replace(tiny_config.data, url="https://somebody:planted-data@host/kept-5?sig=planted")
    with (
        pytest.raises(KeyError) as raised,
        bundle.bundle_on_crash(replace(tiny_config, data=data)),
    ):
        raise KeyError(everything.decode())
    (parts,) = bundles(output).values()
    for name, text in parts.items():
        assert "planted" not in text.lower(), f"{name}: {text}"
    assert "kept-1" in parts["environment.txt"] and "kept-5" in parts["config.json"]
    assert all(f"kept-{number}" in parts["ranks.txt"] for number in (2, 3, 4))
    assert "planted-query" in str(raised.value), "the error itself is as it was"


def test_numbers_and_settings_are_no_secrets(tiny_config: RunConfig) -> None:
    plain = bundle.Secrets({}).left_out_of(bundle.to_json(tiny_config))
    assert plain == bundle.to_json(tiny_config)
    line = 'File "a.py", line 3, in f: sorted(items, key=len); loss: 1.5; s3://bucket/run@2'
    assert bundle.Secrets({}).left_out_of(line) == line


def test_only_the_last_lines_of_a_long_log(tiny_config: RunConfig) -> None:
    lines = [f'{{"step": {step}}}\n' for step in range(1, 40_001)]
    storage.write_bytes(tiny_config.output, "config.json", b"{}")
    storage.write_bytes(tiny_config.output, "log.jsonl", "".join(lines).encode())
    bundle.main([tiny_config.output])
    (parts,) = bundles(tiny_config.output).values()
    assert parts["log.jsonl"] == "".join(lines[-200:])
    assert parts["error.txt"] == "none\n"
    assert parts["run.json"].startswith("not found out: MissingObjectError")


def test_by_hand_it_wants_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bundle.main([str(tmp_path / "nowhere")])
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("can_write_here", [True, False])
def test_where_the_run_folder_cannot_be_written_it_lies_elsewhere(
    can_write_here: bool,
    tiny_config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(bundle, "_parts", lambda run, error: {})
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here" if can_write_here else "/proc")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "file").write_text("")
    config = replace(tiny_config, output=str(tmp_path / "file" / "run"))
    with pytest.raises(KeyError), bundle.bundle_on_crash(config):
        raise KeyError("a bug")
    (file,) = (tmp_path / ("here" if can_write_here else "temporary")).glob("tmu-dist-crash-*.zip")
    assert str(file) in caplog.text
    assert zipfile.ZipFile(file).namelist() == ["config.json"]


def test_what_hangs_or_fails_is_said_and_the_error_stays(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> str:
        raise OSError("no such program")

    parts = {"hangs.txt": lambda: os.read(os.pipe()[0], 1).decode(), "fails.txt": fail}
    monkeypatch.setattr(bundle, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(bundle, "_parts", lambda run, error: parts)
    with pytest.raises(KeyError), bundle.bundle_on_crash(tiny_config):
        raise KeyError("a bug")
    (found,) = bundles(tiny_config.output).values()
    assert found["hangs.txt"] == "not found out in 0.2 s\n"
    assert found["fails.txt"] == "not found out: OSError: no such program\n"

    monkeypatch.setattr(bundle, "write_bundle", lambda *_: 1 / 0)
    with pytest.raises(KeyError), bundle.bundle_on_crash(tiny_config):
        raise KeyError("a bug")
    assert "There is no bundle for a bug report: division by zero" in caplog.text
