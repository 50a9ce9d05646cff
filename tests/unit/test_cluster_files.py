"""The files of cluster/: Ray takes them, their knobs turn, and they are closed to strangers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.render import Knob, check, knobs_of, main, render

_ROOT = Path(__file__).parents[2]
_CLUSTER = _ROOT / "cluster"
_FILES = sorted(path for path in _CLUSTER.rglob("*") if path.is_file() and path.suffix != ".pyc")
_RAY_UP = [path for path in _FILES if re.search(r"^cluster_name:", path.read_text(), re.M)]
_WITH_KNOBS = [path for path in _FILES if path.suffix == ".yaml" and "# knob" in path.read_text()]
_SMALL = """
# A comment.
cluster_name: small  # knob name: of the cluster
max_workers: 2  # knob workers: at most
provider:
  type: local
  head_ip: 10.0.0.1  # knob head-ip: address
  worker_ips: [10.0.0.2, 10.0.0.3]  # knob worker-ips: addresses
auth: {ssh_user: me}
head_start_ray_commands:
  - |
    export PLACE=~/there  # knob place: of things
    echo $PLACE
worker_start_ray_commands:
  - cd ~/there  # knob command: to begin with
"""


def _name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("file", _RAY_UP, ids=_name)
def test_ray_takes_the_file_as_it_is_and_with_every_knob_turned(file: Path) -> None:
    text = file.read_text()
    assert check(text), "Ray's validator was not there"
    turned = {name: _turned(name, knob) for name, knob in knobs_of(text).items()}

    rendered = render(text, {name: _typed(value) for name, value in turned.items()})

    assert {name: knob.default for name, knob in knobs_of(rendered).items()} == turned
    assert check(rendered)
    assert [_comment(line) for line in rendered.splitlines()] == [
        _comment(line) for line in text.splitlines()
    ]


def _turned(name: str, knob: Knob) -> Any:
    """Another value of the same kind."""
    match knob.default:
        case bool():
            return not knob.default
        case int() | float():
            return knob.default + 1
        case list():
            return ["10.9.9.1", "10.9.9.2", "10.9.9.3"]
        case _:
            return f"other/{name}"


def _typed(value: Any) -> str:
    """As one would give it in a command."""
    return ",".join(value) if isinstance(value, list) else json.dumps(value).strip('"')


def _comment(line: str) -> str:
    return line.partition("#")[2]


@pytest.mark.parametrize("file", _WITH_KNOBS, ids=_name)
def test_every_knob_has_help(file: Path) -> None:
    assert all(len(knob.help) > 5 for knob in knobs_of(file.read_text()).values())


def test_values_become_what_their_place_needs() -> None:
    values = {"name": "true", "worker-ips": "[1.1.1.1]", "place": "a b", "command": "x: #1"}

    config = yaml.safe_load(render(_SMALL, values))

    assert config["cluster_name"] == "true"
    assert config["provider"]["worker_ips"] == ["1.1.1.1"]
    assert config["head_start_ray_commands"][0].startswith("export PLACE='a b'  # knob")
    assert config["worker_start_ray_commands"] == ["x: #1"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"worker": "3"}, "no knob --worker: did you mean --workers?"),
        ({"zzz": "3"}, "it has name, workers"),
        ({"workers": "many"}, "--workers must be a whole number, such as 2, not 'many'"),
        ({"workers": "2.5"}, "whole number"),
        ({"workers": "true"}, "whole number"),
        ({"worker-ips": "[a, b"}, "a list: a,b"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        render(_SMALL, values)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a: 1  # knob workers: again", "knob workers is 1 here and 2 above"),
        ("a: 1  # knob new", "knob new has no help"),
        ("    # knob new: of nothing", "no value for its knob"),
    ],
)
def test_wrong_knobs_are_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        knobs_of(_SMALL + line + "\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("idle_minutes: 3", "idle_minutes"),
        ("max_workers: many", "max_workers"),
        ("a: [", "not YAML"),
    ],
)
def test_a_file_that_ray_would_refuse_is_refused(line: str, message: str) -> None:
    assert check(_SMALL)
    with pytest.raises(ValueError, match=message):
        check(_SMALL.replace("max_workers: 2  # knob workers: at most", line))


def test_the_command_prints_a_file_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, _CLUSTER / "render.py", _CLUSTER / "gpu.yaml"]
    done = subprocess.run(
        [*command, "--home", "s3://mine/tmu", "--max-spot=3"], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    text = (_CLUSTER / "gpu.yaml").read_text()
    assert done.stdout == render(text, {"home": "s3://mine/tmu", "max-spot": "3"})
    assert yaml.safe_load(done.stdout)["available_node_types"]["gpu_spot"]["max_workers"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--worker", "1"], "did you mean --workers?"),
        (["--workers", "x"], "whole number"),
        (["3"], "write --NAME VALUE"),
    ],
)
def test_the_command_says_what_is_wrong(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.yaml").write_text(_SMALL)
    monkeypatch.setattr(sys, "argv", ["render.py", str(tmp_path / "small.yaml"), *words])
    with pytest.raises(SystemExit, match=re.escape(message)):
        main()


def test_the_command_lists_the_knobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["render.py", str(_CLUSTER / "gpu.yaml"), "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    for name, knob in knobs_of((_CLUSTER / "gpu.yaml").read_text()).items():
        assert f"--{name} " in shown and knob.help.split()[0] in shown


@pytest.mark.parametrize("part", ["head", "worker"])
@pytest.mark.parametrize("file", _RAY_UP, ids=_name)
def test_ray_starts_closed_to_strangers_and_quick_to_notice(
    file: Path, part: str, tmp_path: Path
) -> None:
    """The commands themselves, in the shell that Ray gives them, with a `ray` that notes them."""
    config = yaml.safe_load(render(file.read_text(), {"home": "s3://mine/tmu"}))
    _home_with(tmp_path, "ray", 'echo "$@" >> ~/calls; [ "$1" != start ] || env > ~/environment')
    settings = [command for command in config["setup_commands"] if "settings" in command]

    for command in [*settings, *config[f"{part}_start_ray_commands"]]:
        _run_as_ray_does(tmp_path, f"export RAY_HEAD_IP=10.0.0.1; {command}")

    stop, start = (tmp_path / "calls").read_text().splitlines()
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines()
    )
    assert stop == "stop"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["RAY_health_check_failure_threshold"] == "3"
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    assert environment["TMU_DIST_HOME"] == "s3://mine/tmu"
    assert "lo" in environment["NCCL_SOCKET_IFNAME"]
    assert "OMP_NUM_THREADS" not in environment  # Ray's shell sets it to 1
    if part == "head":
        assert "--dashboard-host=127.0.0.1" in start
        assert "--autoscaling-config=" in start
    else:
        assert "--address=10.0.0.1:6379" in start
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def _home_with(home: Path, command: str, script: str) -> None:
    """A machine's home folder as the file mounts leave it, with one command in its environment."""
    shutil.copytree(_CLUSTER, home / "tmu-dist" / "cluster")
    (home / ".bashrc").touch()
    path = home / "tmu-dist-venv" / "bin" / command
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def _run_as_ray_does(home: Path, command: str) -> None:
    from ray.autoscaler._private.command_runner import _with_interactive

    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "USER": "me"}
    done = subprocess.run(
        ["bash", "-c", " ".join(_with_interactive(command))],
        env=environment | {"SSH_CONNECTION": "10.0.0.9 40000 10.0.0.1 22"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", _RAY_UP, ids=_name)
def test_what_is_copied_exists_and_is_all_that_is_needed(file: Path) -> None:
    mounts = yaml.safe_load(file.read_text())["file_mounts"]
    copied = {local for local in mounts.values() if not local.startswith("~")}
    assert all((_ROOT / local).exists() for local in copied)
    assert "." not in copied  # Ray would read and hash all of it, with environments and data

    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    needed = {name.removesuffix("*") for name in packages} | {project["project"]["readme"]}
    assert needed | {"pyproject.toml", "constraints.txt", "cluster"} <= copied


@pytest.mark.parametrize("file", _RAY_UP, ids=_name)
def test_what_is_installed_is_an_extra_of_the_project(file: Path) -> None:
    extras = knobs_of(file.read_text())["extras"].default.split(",")
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    assert set(extras) <= project["project"]["optional-dependencies"].keys()


@pytest.mark.parametrize("file", _FILES, ids=_name)
def test_no_secret_no_open_door_and_no_second_place_for_versions(file: Path) -> None:
    text = file.read_text()
    assert "0.0.0.0" not in text
    assert not re.search(r"\bAKIA[0-9A-Z]{16}\b|PRIVATE KEY-----|\b[0-9a-f]{40,}\b", text)
    assert not re.search(r"(?i)(secret_access_key|auth_token|password)\s*[=:]\s*[\w\"']", text)
    assert not re.search(r"\b(torch|ray|numpy|pip install \S+)\s*[=~]=\s*\d", text)
    if "ray start" in text and file.suffix in (".yaml", ".sh"):
        assert re.search(r"node_env\.sh|RAY_AUTH_MODE=token|mode: token", text)


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        ("echo 595.91.07", ""),
        ("echo 580.65.06", ""),
        ("printf '590.1\\n570.86.10\\n'", "570.86.10 is too old: torch needs 580"),
        ("exit 9", "nvidia-smi fails"),
    ],
)
def test_an_old_driver_is_refused_before_anything_is_installed(
    driver: str, message: str, tmp_path: Path
) -> None:
    for name, script in (("nvidia-smi", driver), ("grep", "exit 0")):  # grep finds a GPU
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", _CLUSTER / "check_driver.sh"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (not message)
    assert message in done.stderr


def test_the_least_driver_is_that_of_the_pinned_cuda() -> None:
    """CUDA 13 needs 580; with another CUDA, check_driver.sh and the images must be thought over."""
    assert "nvidia-cuda-runtime==13." in (_ROOT / "constraints.txt").read_text()
    assert "least=580 # for CUDA 13," in (_CLUSTER / "check_driver.sh").read_text()
    assert "with-nvidia-580" in (_CLUSTER / "gpu_gcp.yaml").read_text()


@pytest.mark.parametrize("file", sorted((_CLUSTER / "policies").glob("*.json")), ids=_name)
def test_policies_allow_only_what_they_name(file: Path) -> None:
    for statement in json.loads(file.read_text())["Statement"]:
        assert statement["Effect"] == "Allow"
        assert all(re.fullmatch(r"[a-z0-9]+:[A-Za-z]+", action) for action in statement["Action"])
        only_looks = all(":Describe" in action for action in statement["Action"])
        assert only_looks or statement["Resource"] != "*"
