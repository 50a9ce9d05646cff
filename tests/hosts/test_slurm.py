"""A job of real Slurm over two machines: its time ends, it goes back to the queue, and finishes."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.test_kill import command
from tests.hosts.machines import Machine, machines, why_not
from tests.hosts.test_hosts import losses, newest_step, of_kind, on_machines
from tmu_dist.config import RunConfig
from tmu_dist.run_folder import RESULT_FILE

pytestmark = pytest.mark.hosts

_ROOT = Path(__file__).parents[2]
_SECONDS = 300.0
_CONFIG = """
ClusterName=test
SlurmctldHost={head.name}({head.address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
ReturnToService=2
StateSaveLocation={folder}
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
NodeName=machine-1 NodeAddr=10.77.0.1 CPUs=1
NodeName=machine-2 NodeAddr=10.77.0.2 CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """Slurm over some machines; its commands are given on the first one."""

    machines: list[Machine]
    folder: Path
    """Of all of them: its configuration, and the users' home."""

    def __call__(self, *words: str) -> str:
        """Run one of its commands; returns what it printed."""
        variables = {"SLURM_CONF": str(self.folder / "slurm.conf"), "HOME": str(self.folder)}
        path = f"{Path(sys.executable).parent}:{self.machines[0].command([])[1]['PATH']}"
        return self.machines[0].run(words, PATH=path, **variables)

    def submit(self, *words: str) -> str:
        """Queue a command for two machines; returns the job's number."""
        options = ["--nodes=2", "--time=60", f"--chdir={_ROOT}", "--parsable"]
        output = f"--output={self.folder}/%j.txt"
        return self("sbatch", *options, output, str(_ROOT / "cluster/slurm.sh"), *words).strip()

    def job(self, number: str) -> dict[str, str]:
        """What it knows about a job."""
        words = self("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, **wanted: str) -> None:
        """Return as soon as a job is in this state."""
        deadline = time.monotonic() + _SECONDS
        while not wanted.items() <= (job := self.job(number)).items():
            assert time.monotonic() < deadline, (wanted, job, self.said(number))
            time.sleep(0.5)

    def said(self, number: str) -> str:
        """What a job printed so far."""
        file = self.folder / f"{number}.txt"
        return file.read_text() if file.exists() else ""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    """Two machines of one CPU each; the first one has the controller, too."""
    missing = [tool for tool in ("slurmctld", "slurmd", "sbatch") if shutil.which(tool) is None]
    if reason := why_not() or (f"no {', '.join(missing)} here (Slurm)" if missing else None):
        pytest.skip(reason)
    folder = tmp_path / "slurm"
    with machines(2, tmp_path / "machines") as made:
        folder.mkdir()
        (folder / "slurm.conf").write_text(_CONFIG.format(head=made[0], folder=folder))
        file = str(folder / "slurm.conf")
        made[0].begin(["slurmctld", "-D", "-i", "-f", file], folder / "slurmctld.txt")
        for machine in made:
            words = ["slurmd", "-D", "-N", machine.name, "-f", file]
            machine.begin(words, folder / f"{machine.name}.txt")
        slurm = Slurm(made, folder)
        deadline = time.monotonic() + _SECONDS
        while slurm("sinfo", "--noheader", "--format=%t %D").split() != ["idle", "2"]:
            assert time.monotonic() < deadline, (folder / "slurmctld.txt").read_text()
            time.sleep(0.5)
        yield slurm


def test_a_job_goes_back_to_the_queue_when_its_time_ends_and_finishes(
    slurm: Slurm, tmu_config: RunConfig, tmp_path: Path
) -> None:
    config = on_machines(tmu_config, 2, steps=150)
    run = config.output
    number = slurm.submit(*command(config, tmp_path))
    deadline = time.monotonic() + _SECONDS
    while newest_step(run) < 5:
        assert time.monotonic() < deadline, slurm.said(number)
        time.sleep(0.2)
    (token,) = slurm.folder.glob(".tmu-dist-token-*")
    assert token.stat().st_mode & 0o777 == 0o600
    slurm("scancel", "--batch", "--signal=USR1", number)  # as Slurm does before the time is over
    slurm.wait_for(number, Restarts="1")
    stopped_at = newest_step(run)
    assert 5 <= stopped_at < 150
    slurm.wait_for(number, JobState="COMPLETED", ExitCode="0:0")

    said = slurm.said(number)
    assert f"was stopped after step {stopped_at} of 150" in said, said
    assert f"continues at step {stopped_at}" in said, said
    assert len(losses(run)) == 150 and Path(run, RESULT_FILE).exists()
    assert [event["world_size"] for event in of_kind(run, "resume")] == [2]
    assert not token.exists()
    for machine in slurm.machines:
        assert not machine.processes("raylet"), f"Ray is left on {machine.name}"
