"""Real machines with their own networks and processes: trained across, cut off, killed, mended.

The command is the real one, given on the head's machine. Runs are compared with a plain process or
torchrun on this machine: what machines do to a run must not show in its numbers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.descriptors import opened_by
from tests.e2e.test_kill import command, finish, start
from tests.hosts.machines import RAY, Cluster, Command, Machine, why_not
from tests.s3_servers import s3_environment
from tests.unit.test_training import assert_same, final_state
from tmu_dist.config import FaultConfig, LaunchConfig, RunConfig, ScaleConfig
from tmu_dist.data.storage import exists
from tmu_dist.folders import write_text
from tmu_dist.run_folder import LOG_FILE, RESULT_FILE, Event, read_log
from tmu_dist.training.launch import launch
from tmu_dist.training.stopping import STOP_FILE

pytestmark = pytest.mark.hosts

_SECONDS = 300.0
"""Far more than anything here takes; these machines share few cores with other tests."""
_STORE_PORT = 9000
_WORKER = "RayTrainWorker"
_STOPPED = 143
"""128 + SIGTERM: the exit status of a run that was asked to stop."""


def on_machines(config: RunConfig, num_workers: int | str, steps: int) -> RunConfig:
    """A run that notices soon what happens to its nodes."""
    return replace(
        config,
        training=replace(config.training, num_steps=steps),
        schedule=replace(config.schedule, validate_every=100, checkpoint_every=20),
        launch=LaunchConfig(launcher="ray"),
        scale=ScaleConfig(num_workers=num_workers, resize_seconds=2),
        faults=FaultConfig(start_timeout_seconds=25),
    )


def begin(cluster: Cluster, config: RunConfig, folder: Path, **variables: str) -> Command:
    """Give the command on the head's machine."""
    words = command(config, folder)
    return cluster.head.begin(words, folder / "said.txt", RAY_ADDRESS=cluster.address, **variables)


def of_kind(run: str, kind: str) -> list[Event]:
    return [event for event in read_log(run) if event["event"] == kind]


def newest_step(run: str) -> int:
    return max((event["step"] for event in of_kind(run, "train")), default=0)


def losses(run: str) -> list[float]:
    """Of every step; each stands in the log once."""
    trained = of_kind(run, "train")
    assert [event["step"] for event in trained] == list(range(1, len(trained) + 1))
    return [event["loss/total"] for event in trained]


def sizes(run: str) -> list[int]:
    """Ranks of every worker group after the first."""
    return [event["world_size"] for event in of_kind(run, "resume")]


def checkpoints(run: str) -> set[str]:
    """Names of those that are there."""
    return {folder.name for folder in Path(run, "checkpoints").glob("step-*")}


def newest_checkpoint(run: str) -> int:
    """The step of the newest one."""
    return max(int(name.removeprefix("step-")) for name in checkpoints(run))


def has_open(process: int, file: Path) -> bool:
    """Whether a process writes to a file, or to one that was replaced by this."""
    return not {str(file), f"{file} (deleted)"}.isdisjoint(opened_by(process))


def assert_same_path(run: str, config: RunConfig, rtol: float = 1e-4) -> None:
    """The run took the path of a plain process, but for sums that ranks group differently."""
    found = losses(run)
    plain = replace(
        config,
        output=f"{config.output}-plain",
        training=replace(config.training, num_steps=len(found)),
        launch=LaunchConfig(launcher="local"),
        scale=ScaleConfig(),
    )
    expected = losses(launch(plain).run)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=rtol, atol=0.0)
    assert max(expected) > 1.1 * min(expected), "nothing was learned that could differ"


def serve_bucket(machine: Machine, folder: Path) -> dict[str, str]:
    """Start an S3 server with an empty bucket on a machine; what reaches it from all of them."""
    words = ["-m", "moto.server", "-H", machine.address, "-p", str(_STORE_PORT)]
    server = machine.begin([sys.executable, *words], folder / "store.txt")
    server.wait_for(lambda: "Running on" in server.said, _SECONDS)
    url = f"http://{machine.address}:{_STORE_PORT}"
    request = f"Request('{url}/bucket', method='PUT')"
    in_python(machine, f"from urllib.request import Request, urlopen; urlopen({request})")
    return s3_environment(url)


def in_python(machine: Machine, program: str, **variables: str) -> None:
    machine.run([sys.executable, "-c", program], **variables)


def reaches(machine: Machine, address: str) -> bool:
    """Whether a machine can speak to a port of another one; waits a second for it."""
    knock = f"</dev/tcp/{address.replace(':', '/')}"
    words = ["timeout", "1", "bash", "-c", f"({knock}) 2>/dev/null || sleep 2"]
    try:
        machine.run(words)
    except RuntimeError:
        return False
    return True


def under_torchrun(config: RunConfig, folder: Path) -> str:
    """The same run on two ranks of this machine; returns its folder."""
    plain = replace(config, output=str(folder / "torchrun"), scale=ScaleConfig())
    python, *words = command(plain, folder, "--launcher", "torchrun")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finish(start([python, *launcher, *words]))
    return plain.output


_MAKE_AND_DIE = """
import os, sys
from pathlib import Path
from tests.hosts.machines import machines
with machines(1, Path(sys.argv[1])) as (machine,):
    machine.begin(["sleep", "1000"], Path(sys.argv[1], "said.txt"))
    while not (sleeping := machine.processes("sleep\\0")):
        pass
    print(sleeping[0], flush=True)
    os.kill(os.getpid(), 9)
"""


def test_machines_end_with_the_process_that_made_them(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    words = [sys.executable, "-c", _MAKE_AND_DIE, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    made = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert made.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while (sleeping := Path("/proc", made.stdout.strip())).exists():
        assert time.monotonic() < deadline, f"{sleeping} still runs"
        time.sleep(0.05)


def test_trains_across_machines_and_over_a_short_cut_of_a_link(
    cluster: Cluster, tmu_config: RunConfig, tmp_path: Path
) -> None:
    """The run folder is in a store on the head's machine, which the cut is between, too."""
    config = on_machines(tmu_config, 2, steps=300)
    variables = serve_bucket(cluster.head, tmp_path)
    in_store = replace(config, output="s3://bucket/run")
    training = begin(cluster, in_store, tmp_path, **variables)
    training.wait_for(lambda: "step 1/300" in training.said, _SECONDS)
    assert [len(node.processes(_WORKER)) for node in cluster.nodes] == [1, 1]
    assert reaches(cluster.nodes[1], cluster.address)
    cluster.nodes[1].cut()
    time.sleep(2)
    assert not reaches(cluster.nodes[1], cluster.address)
    cluster.nodes[1].restore()
    assert training.is_running and "step 300/300" not in training.said
    assert training.wait(_SECONDS) == 0, training.said

    run = str(tmp_path / "fetched")
    fetch = f"import pyarrow.fs as f; f.copy_files('s3://bucket/run', {run!r})"
    in_python(cluster.head, fetch, **variables)
    assert of_kind(run, "resume") == []
    plain = under_torchrun(config, tmp_path)
    assert losses(run) == losses(plain)
    assert_same(final_state(run), final_state(plain))


def test_killed_machine_shrinks_the_run_and_its_return_lets_it_grow(
    cluster: Cluster, tmu_config: RunConfig, tmp_path: Path
) -> None:
    config = on_machines(tmu_config, "1..2", steps=100_000)
    run, node = config.output, cluster.nodes[1]
    training = begin(cluster, config, tmp_path)
    training.wait_for(lambda: newest_step(run) >= 50, _SECONDS)
    before = newest_checkpoint(run)
    node.kill()
    training.wait_for(lambda: sizes(run) == [1], _SECONDS)
    shrunk = of_kind(run, "resume")[0]["step"]
    training.wait_for(lambda: newest_step(run) >= shrunk + 50, _SECONDS)
    node.start()
    cluster.join(node)
    training.wait_for(lambda: sizes(run) == [1, 2], _SECONDS)
    grown = of_kind(run, "resume")[1]["step"]
    training.wait_for(lambda: newest_step(run) >= grown + 50, _SECONDS)
    write_text(run, STOP_FILE, "seen enough")
    assert training.wait(_SECONDS) == _STOPPED, training.said
    assert 20 <= before <= shrunk < grown < newest_step(run)
    assert_same_path(run, config)


def test_machine_that_is_cut_off_cannot_write_into_the_run(
    cluster: Cluster, tmu_config: RunConfig, tmp_path: Path
) -> None:
    """Its worker has the disk in reach and, being the only one, waits for nobody: it trains on."""
    config = on_machines(tmu_config, 1, steps=100_000)
    run, log = config.output, Path(config.output, LOG_FILE)
    training = begin(cluster, config, tmp_path)
    training.wait_for(lambda: newest_step(run) >= 50, _SECONDS)
    (lost,) = [node for node in cluster.nodes if node.processes(_WORKER)]
    (worker,) = lost.processes(_WORKER)
    before = newest_checkpoint(run)
    lost.cut()
    assert has_open(worker, log)
    training.wait_for(lambda: sizes(run) == [1], _SECONDS)
    training.wait_for(lambda: not has_open(worker, log), 30)
    assert worker in lost.processes(_WORKER), "ended by somebody else"
    resumed = of_kind(run, "resume")[0]["step"]
    training.wait_for(lambda: newest_step(run) >= resumed + 50, _SECONDS)
    write_text(run, STOP_FILE, "seen enough")
    assert training.wait(_SECONDS) == _STOPPED, training.said
    assert 20 <= before <= resumed
    assert_same_path(run, config, rtol=0.0)


def test_lost_head_ends_the_command_and_the_same_command_goes_on(
    cluster: Cluster, tmu_config: RunConfig, tmp_path: Path
) -> None:
    config = on_machines(tmu_config, 2, steps=150)
    run = config.output
    # How long it waits for the head to come back, as in cluster/node_env.sh.
    training = begin(cluster, config, tmp_path, RAY_gcs_rpc_server_reconnect_timeout_s="15")
    training.wait_for(lambda: newest_step(run) >= 50, _SECONDS)
    before = newest_checkpoint(run)
    cluster.head.kill()
    training.wait(_SECONDS)
    assert not exists(run, RESULT_FILE), "killed too late to prove anything"
    for node in cluster.nodes:
        node.run([RAY, "stop", "--force"])
    cluster.head.start()
    cluster.start()
    training = begin(cluster, config, tmp_path)
    assert training.wait(_SECONDS) == 0, training.said
    (resume,) = of_kind(run, "resume")
    assert 20 <= before <= resume["step"]
    plain = under_torchrun(config, tmp_path)
    assert losses(run) == losses(plain)
    assert_same(final_state(run), final_state(plain))
