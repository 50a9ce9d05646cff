"""Several machines on this one: each its own network, processes, host name, /tmp/ray and home.

A machine is a set of Linux namespaces that one process of this test holds open. They sit on a
switch of their own that leads nowhere else, and share the disk, as nodes share an NFS folder. None
of it has a name outside: when the holders end, even because the test itself was killed, the kernel
takes processes, interfaces and mounts away with them.

Losing power is `kill`: the link goes down first, so that the other machines hear nothing, as they
would of a real one; a killed process alone would still say goodbye to everybody it talked to.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
"""The command of this environment."""
_HEAD_PORT = 6379
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""For `ray start` of head and nodes: a node that is silent for about five seconds is lost."""

_ROOT = Path(__file__).parents[2]
_TOOLS = {
    "ip": "iproute2",
    "mount": "mount",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}
"""Programs, and the packages that have them."""
_SSH_TOOLS = {
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "rsync": "rsync",
    "uptime": "procps",  # what `ray up` asks of a machine first
}
_NAMESPACES = ("--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child")
_LOOK_SECONDS = 0.1
_OBJECT_STORE_BYTES = 100_000_000
_HOLD = """
hostname "$1"
mount --bind "$2/ray" /tmp/ray
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/passwd" /etc/passwd
mount -t tmpfs run /run
mount -t tmpfs -o size=300m shm /dev/shm
ip link set lo up
echo ready
cat
exit
"""
"""What a machine's first process does: it makes the machine, and lives until its input ends."""


def why_not(with_ssh: bool = False) -> str | None:
    """Why this system cannot have machines, such that take commands over SSH; None if it can."""
    if not sys.platform.startswith("linux"):
        return f"network namespaces need Linux, this is {sys.platform}"
    tools = _TOOLS | (_SSH_TOOLS if with_ssh else {})
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        packages = sorted({tools[tool] for tool in missing})
        return f"{', '.join(missing)} not found (packages {', '.join(packages)})"
    if os.geteuid() != 0:
        return "namespaces and network links need root"
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "ip", "link", "add", "bridge", "type", "bridge"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return f"namespaces are forbidden here: {tried.stderr.strip()}" if tried.returncode else None


class Switch:
    """What the machines' links end in; leads nowhere else."""

    def __init__(self) -> None:
        self._holder = _hold(["unshare", "--net"], "ip link set lo up; echo ready; cat; exit")
        self.pid = self._holder.pid
        self._ip("link", "add", "bridge", "type", "bridge")
        self._ip("link", "set", "bridge", "up")

    def connect(self, port: str, machine: int) -> None:
        """Lay a link from a port to the eth0 of a machine, given by its process."""
        link = f"eth0 netns {machine} type veth peer {port} netns {self.pid}"
        _run(["ip", "link", "add", *link.split()])
        self._ip("link", "set", port, "up")
        self.restore(port)

    def cut(self, port: str) -> None:
        """Pass nothing on to or from a port; the interface at the other end stays up."""
        self._ip("link", "set", port, "nomaster")

    def restore(self, port: str) -> None:
        """Pass everything on again."""
        self._ip("link", "set", port, "master", "bridge")

    def disconnect(self, port: str) -> None:
        """Take a link away, both ends."""
        self._ip("link", "delete", port)

    def close(self) -> None:
        """Take the switch away, and with it every link."""
        _end(self._holder)

    def _ip(self, *words: str) -> None:
        _run(["nsenter", "--target", str(self.pid), "--net", "ip", *words])


class Machine:
    """One machine, off at first.

    Args:
        switch: what it is connected to.
        number: from 1; its address is 10.77.0.number.
        folder: for what is its own: home and /tmp/ray, which stay when it is killed.
    """

    def __init__(self, switch: Switch, number: int, folder: Path) -> None:
        self.name = f"machine-{number}"
        self.address = f"10.77.0.{number}"
        self.folder = folder
        self.home = folder / "home"
        self._switch = switch
        self._port = f"port{number}"
        self._holder: subprocess.Popen[str] | None = None
        for part in ("ray", "home"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        # As Debian and Ubuntu write it: by its name, a machine finds only itself.
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        users = Path("/etc/passwd").read_text().splitlines()
        users = [user for user in users if not user.startswith("root:")]
        users.append(f"root:x:0:0:root:{self.home}:/bin/bash")
        (folder / "passwd").write_text("\n".join(users) + "\n")

    @property
    def pid(self) -> int:
        """Of the process that holds the machine."""
        assert self._holder is not None, f"{self.name} is off"
        return self._holder.pid

    def start(self) -> None:
        """Switch it on; it was off."""
        assert self._holder is None, f"{self.name} is on"
        Path("/tmp/ray").mkdir(exist_ok=True)  # to mount its own over
        self._holder = _hold(["unshare", *_NAMESPACES], _HOLD, self.name, str(self.folder))
        self._switch.connect(self._port, self.pid)
        self.run(["ip", "address", "add", f"{self.address}/24", "dev", "eth0"])
        self.run(["ip", "link", "set", "eth0", "up"])

    def kill(self) -> None:
        """Take its power away, if it has any: all in it is gone, and nobody is told."""
        if self._holder is not None:
            self._switch.disconnect(self._port)
            _end(self._holder)
            self._holder = None

    def cut(self) -> None:
        """Interrupt its link."""
        self._switch.cut(self._port)

    def restore(self) -> None:
        """Mend its link."""
        self._switch.restore(self._port)

    def command(self, words: Sequence[str], **variables: str) -> tuple[list[str], dict[str, str]]:
        """What starts a command in this machine, at the project's root, and its environment.

        Nothing of the test's own environment goes along: a machine has its own.
        """
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--net"]
        enter += [f"--pid=/proc/{self.pid}/ns/pid_for_children", f"--wd={_ROOT}", *words]
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "PYTHONPATH": str(_ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "120",  # machines share few cores
            **variables,
        }
        return enter, environment

    def run(self, words: Sequence[str], **variables: str) -> str:
        """Run a command to its end; returns what it printed.

        Raises:
            RuntimeError: it failed; with what it said.
        """
        return _run(*self.command(words, **variables))

    def begin(self, words: Sequence[str], output: Path, **variables: str) -> Command:
        """Start a command whose output goes to a file."""
        return Command(*self.command(words, **variables), output)

    def serve_ssh(self, key: Path) -> None:
        """Let in over SSH, as root, who has the private key of a pair; not after `kill`."""
        (self.folder / "authorized_keys").write_bytes(key.with_suffix(".pub").read_bytes())
        (self.folder / "sshd_config").write_text(
            f"ListenAddress {self.address}\n"
            f"HostKey {key}\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\n"
            "PasswordAuthentication no\n"
            "StrictModes no\n"  # /tmp, where all of it lies, is everybody's
            "PidFile none\n"
        )
        self.run(["mkdir", "-p", "/run/sshd"])
        sshd = shutil.which("sshd")  # it wants to know its whole name
        assert sshd is not None
        self.run([sshd, "-f", str(self.folder / "sshd_config")])

    def processes(self, title: str) -> list[int]:
        """Ids, outside, of its processes with a word in their command lines."""
        space = Path(f"/proc/{self.pid}/ns/pid_for_children").readlink()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # gone since
                is_inside = (process / "ns/pid").readlink() == space
                if is_inside and title.encode() in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
        return found


class Command:
    """A command that runs in a machine."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
        self.output = output
        with output.open("a") as file:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environment),
            )

    @property
    def said(self) -> str:
        """Everything that it printed so far."""
        return self.output.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait(self, seconds: float) -> int:
        """Its exit status, negative for a signal."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {seconds:.0f} s; it said:\n{self.said}") from None

    def wait_for(self, happened: Callable[[], bool], seconds: float) -> None:
        """Return as soon as something has happened that this command works on.

        Raises:
            RuntimeError: it ended, or the time is over, before that.
        """
        deadline = time.monotonic() + seconds
        while not happened():
            if not self.is_running or time.monotonic() > deadline:
                state = "still running" if self.is_running else "over"
                raise RuntimeError(f"waited in vain, the command is {state}; said:\n{self.said}")
            time.sleep(_LOOK_SECONDS)


def make_key(folder: Path) -> Path:
    """Make a pair of SSH keys; returns the private one's path, the other's ends in .pub."""
    key = folder / "key"
    _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)])
    return key


@contextmanager
def machines(count: int, folder: Path) -> Iterator[list[Machine]]:
    """So many machines on one switch, for the time of a `with` block.

    Args:
        count: of machines.
        folder: each has its own folder there.
    """
    with ExitStack() as parts:
        switch = Switch()
        parts.callback(switch.close)
        made = [Machine(switch, number, folder / str(number)) for number in range(1, count + 1)]
        for machine in made:
            parts.callback(machine.kill)
            machine.start()
        yield made


@dataclass(frozen=True)
class Cluster:
    """Ray over some machines: a head that trains nothing, and nodes of one CPU each."""

    head: Machine
    nodes: tuple[Machine, ...]
    variables: Mapping[str, str] = field(default_factory=lambda: QUICK_HEALTH_CHECKS)
    """Of the environment of `ray start`."""

    @property
    def address(self) -> str:
        """What RAY_ADDRESS is for commands."""
        return f"{self.head.address}:{_HEAD_PORT}"

    def start(self) -> None:
        """Start Ray on all of them."""
        self._start_ray(self.head, 0, "--head", f"--port={_HEAD_PORT}", "--include-dashboard=false")
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.join, self.nodes))

    def join(self, node: Machine, *words: str, **variables: str) -> None:
        """Start Ray on a machine where it does not run.

        Args:
            node: the machine.
            words: for `ray start`.
            variables: of its environment, beside those of all.
        """
        self._start_ray(node, 1, f"--address={self.address}", *words, **variables)

    def _start_ray(self, machine: Machine, cpus: int, *words: str, **variables: str) -> None:
        machine.run(
            [
                RAY,
                "start",
                *words,
                f"--node-ip-address={machine.address}",
                f"--num-cpus={cpus}",
                f"--object-store-memory={_OBJECT_STORE_BYTES}",
                "--disable-usage-stats",
            ],
            **{**self.variables, **variables},
        )


def _hold(namespaces: Sequence[str], script: str, *words: str) -> subprocess.Popen[str]:
    """Start a process in new namespaces that keeps them until its input is closed."""
    holder = subprocess.Popen(
        [*namespaces, "bash", "-ec", script, "bash", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    if holder.stdout.readline() != "ready\n":
        _end(holder)
        raise RuntimeError(f"{' '.join(namespaces)} ... ended with {holder.returncode}")
    return holder


def _end(holder: subprocess.Popen[str]) -> None:
    """Kill a holder; the kernel kills whatever else is in its namespaces."""
    holder.send_signal(signal.SIGKILL)
    for pipe in (holder.stdin, holder.stdout):
        if pipe is not None:
            pipe.close()
    holder.wait()


def _run(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run to the end; what it printed, or an error with what it said."""
    with tempfile.TemporaryFile("w+") as output:  # daemons that it leaves behind keep it open
        status = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=300,
        ).returncode
        output.seek(0)
        said = output.read()
    if status != 0:
        raise RuntimeError(f"{' '.join(words)}: exit status {status}\n{said}")
    return said
