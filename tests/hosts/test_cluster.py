"""`ray up` of `cluster/on_prem.yaml`, a job, the loss of a machine, `ray down`: as a user does it.

A client with SSH and no Ray of its own, a head and two workers that only have sshd and an installed
environment; the archive, the teachers and the run are in an S3 server that asks for keys.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hosts.machines import RAY, Command, Machine, machines, make_key, why_not
from tests.hosts.test_hosts import in_python, losses, of_kind, on_machines, serve_bucket, sizes
from tmu_dist.config import RunConfig, to_json
from tmu_dist.data.storage import exists
from tmu_dist.run_folder import RESULT_FILE
from tmu_dist.training.checkpoint import FACTS_FILE

pytestmark = pytest.mark.hosts

_ROOT = Path(__file__).parents[2]
_SECONDS = 300.0
_STEPS = 400
_DASHBOARD = "http://127.0.0.1:8265"
_SECRET = "secret-of-the-store"
_WITH_TOKEN = {"RAY_AUTH_MODE": "token"}
_OF_RAY = ("raylet", "ray::", "gcs_server", "site-packages/ray/", "node_watch.sh")


def test_a_cluster_over_ssh_from_ray_up_to_ray_down(tmu_config: RunConfig, tmp_path: Path) -> None:
    if reason := why_not(with_ssh=True):
        pytest.skip(reason)
    with machines(4, tmp_path / "machines") as (client, head, *workers):
        key = make_key(client.home)
        for machine in (head, *workers):
            machine.serve_ssh(key)
            install(machine)
        store = {**serve_bucket(client, tmp_path), "AWS_SECRET_ACCESS_KEY": _SECRET}
        config = in_bucket(tmu_config, client, tmp_path, store)
        file = cluster_file(client, head, workers, key, store)

        client.run([RAY, "get-auth-token", "--generate"], **_WITH_TOKEN)
        client.run([RAY, "up", "-y", str(file)])
        tunnel = client.begin([RAY, "dashboard", str(file)], tmp_path / "tunnel.txt")
        tunnel.wait_for(lambda: asked(client, f"{_DASHBOARD}/api/version")[0] != 0, _SECONDS)
        refused = [asked(client, f"{_DASHBOARD}/api/version", word)[0] for word in ("", "guessed")]
        assert refused == [401, 403]
        token = (client.home / ".ray/auth_token").read_text()
        tunnel.wait_for(lambda: alive(client, token) == 3, _SECONDS)

        job = submit(client, tmp_path / "job.txt", config)
        job.wait_for(lambda: has_checkpoint(client, store), _SECONDS)
        assert [len(machine.processes("RayTrainWorker")) for machine in workers] == [1, 1]
        workers[1].kill()
        assert job.wait(_SECONDS) == 0, job.said
        assert f"node {workers[1].address} lost" in job.said
        assert_whole(fetched(client, tmp_path, store))

        workers[1].start()
        workers[1].serve_ssh(key)
        wrong = submit(client, tmp_path / "wrong.txt", config, "--training.batch-size", "0")
        assert wrong.wait(_SECONDS) != 0
        assert "training.batch_size" in wrong.said
        tunnel.wait_for(lambda: alive(client, token) == 3, _SECONDS)
        _, shown = asked(client, f"{_DASHBOARD}/api/v0/runtime_envs?detail=true", token)
        assert "runtime_env" in shown and _SECRET not in shown

        client.run([RAY, "down", "-y", str(file)])
        tunnel.wait_for(lambda: not any(left(machine) for machine in (head, *workers)), 120)


def install(machine: Machine) -> None:
    """Give it this environment as the one that was set up there before."""
    venv = machine.home / "tmu-dist-venv"
    venv.mkdir()
    for part in Path(sys.prefix).iterdir():
        (venv / part.name).symlink_to(part)
    versions = [(_ROOT / name).read_bytes() for name in ("constraints.txt", "pyproject.toml")]
    stamp = hashlib.sha256(b"".join([*versions, b"python3 aws\n"])).hexdigest()
    (venv / "tmu-dist.sha256").write_text(f"{stamp}  -\n")


def in_bucket(config: RunConfig, client: Machine, folder: Path, store: dict[str, str]) -> RunConfig:
    """Copy what a run reads to the bucket; the run, reading it there, whose settings are there."""
    teachers = config.transfer.teachers
    copies = {config.data.url: "archive"}
    copies |= {teacher: f"teacher-{number}" for number, teacher in enumerate(teachers)}
    there = {local: f"s3://bucket/{name}" for local, name in copies.items()}
    config = replace(
        on_machines(config, "1..2", _STEPS),
        output="runs/drill",  # below --home
        data=replace(config.data, url=there[config.data.url]),
        transfer=replace(config.transfer, teachers=tuple(there[name] for name in teachers)),
    )
    (folder / "settings").mkdir()
    (folder / "settings/drill.yaml").write_text(to_json(config))
    there[str(folder / "settings")] = "s3://bucket/settings"
    program = f"import pyarrow.fs as f; [f.copy_files(*pair) for pair in {list(there.items())}]"
    in_python(client, program, **store)
    return config


def cluster_file(
    client: Machine, head: Machine, workers: Sequence[Machine], key: Path, store: dict[str, str]
) -> Path:
    """Write what the user writes: keys of the store, and the cluster's file with other knobs."""
    keys = client.home / "store.sh"
    exported = {**store, "OMP_NUM_THREADS": "1"}  # machines share few cores
    keys.write_text("".join(f"export {name}={value}\n" for name, value in exported.items()))
    knobs = {
        "head-ip": head.address,
        "worker-ips": ",".join(worker.address for worker in workers),
        "ssh-user": "root",
        "ssh-key": key,
        "store": keys,
        "home": "s3://bucket/tmu",
        "object-store": 100_000_000,
    }
    words = [word for name, value in knobs.items() for word in (f"--{name}", str(value))]
    file = client.home / "my.yaml"
    render = [sys.executable, "cluster/render.py", "cluster/on_prem.yaml", *words]
    client.run(["bash", "-c", '"${@:2}" > "$1"', "bash", str(file), *render])
    return file


def submit(client: Machine, output: Path, config: RunConfig, *flags: str) -> Command:
    """Give the command for a run of the settings in the bucket."""
    job = [RAY, "job", "submit", "--address", _DASHBOARD, "--working-dir", ".", "--"]
    settings = "s3://bucket/settings/drill.yaml"
    training = ["python", "-m", "tmu_dist.train", "--recipe", "digits-scratch"]
    words = [*job, *training, "--config", settings, *flags]
    return client.begin(words, output, PYTHONUNBUFFERED="1", **_WITH_TOKEN)


_ASK = """
import sys
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen
try:
    token = {"Authorization": f"Bearer {sys.argv[2]}"} if sys.argv[2] else {}
    answer = urlopen(Request(sys.argv[1], headers=token))
except HTTPError as error:
    answer = error
except (URLError, ConnectionError) as error:
    sys.exit(f"0 {error}")
print(answer.status, answer.read().decode())
"""


def asked(client: Machine, url: str, token: str = "") -> tuple[int, str]:
    """Status and body of what a server answers; status 0 while nobody does."""
    try:
        said = client.run([sys.executable, "-c", _ASK, url, token])
    except RuntimeError as error:
        return 0, str(error)
    status, _, body = said.partition(" ")
    return int(status), body


def alive(client: Machine, token: str) -> int:
    """How many machines the cluster has."""
    status, body = asked(client, f"{_DASHBOARD}/api/v0/nodes", token)
    assert status == 200, body
    nodes = json.loads(body)["data"]["result"]["result"]
    return sum(node["state"] == "ALIVE" for node in nodes)


def has_checkpoint(client: Machine, store: dict[str, str]) -> bool:
    """Whether the bucket has a whole one."""
    query = "list-type=2&prefix=tmu/runs/drill/checkpoints/"
    return FACTS_FILE in asked(client, f"{store['AWS_ENDPOINT_URL']}/bucket?{query}")[1]


def fetched(client: Machine, folder: Path, store: dict[str, str]) -> str:
    """Copy the run from the bucket; returns its folder."""
    run = str(folder / "fetched")
    program = f"import pyarrow.fs as f; f.copy_files('s3://bucket/tmu/runs/drill', {run!r})"
    in_python(client, program, **store)
    return run


def assert_whole(run: str) -> None:
    """It went on where its newest checkpoint was, on one machine, and has its result."""
    assert len(losses(run)) == _STEPS
    assert set(sizes(run)) == {1}
    assert of_kind(run, "resume")[0]["step"] >= 20
    assert exists(run, RESULT_FILE)


def left(machine: Machine) -> list[int]:
    """Processes of Ray on a machine."""
    return [process for title in _OF_RAY for process in machine.processes(title)]
