"""What a run that failed leaves for a bug report: RUN/crash/20261122T030101Z.zip.

    python -m tmu_dist.bundle RUN

makes one by hand, where the process that would have made it was killed. It holds the run's settings
and provenance, the error with its trace, the last lines of the log and of every rank, versions, the
state of this machine and of Ray, and the environment variables that matter. Secrets are left out.
What cannot be found out is said in its place.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tmu_dist.commands import command_errors, is_explained
from tmu_dist.config import RunConfig, to_json
from tmu_dist.data.archive import DamageError, ShardError
from tmu_dist.data.storage import (
    MissingObjectError,
    StorageError,
    join_url,
    local_path,
    object_size,
    read_range,
    read_text,
    write_bytes,
)
from tmu_dist.provenance import command_line, git_revision, source_hash
from tmu_dist.run_folder import (
    CONFIG_FILE,
    CRASH_FOLDER,
    FILE_TIME,
    LOG_FILE,
    PROVENANCE_FILE,
    newest_logs,
)
from tmu_dist.side_by_side import side_by_side
from tmu_dist.workspace import is_in_job, located

log = logging.getLogger(__name__)

_LAST_LINES = 200
_LAST_BYTES = 200_000
_READERS = 16
_PATIENCE_SECONDS = 60.0
"""A store or a Ray that does not answer must not keep a failed job alive."""
_NOTE = "For a bug report, without secrets:"
_VARIABLES = (
    *("AWS_", "AZURE_", "GOOGLE_", "CUDA_", "NCCL_", "GLOO_", "TORCH", "OMP_", "MKL_", "PYTHON"),
    *("RAY_", "SLURM_", "KUBERNETES_", "TMU_DIST_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"),
    *("HTTP", "http", "NO_PROXY", "no_proxy", "LD_LIBRARY_PATH", "PATH"),
)
"""First parts of the names of environment variables that matter."""

Part = Callable[[], str]
"""Finds out what a bundle says under some name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tmu_dist.bundle`."""
    parser = argparse.ArgumentParser(
        prog="python -m tmu_dist.bundle",
        description="Put together what a bug report about a run needs, without secrets.",
    )
    parser.add_argument("run", help="the run folder, or the URL of one")
    run = parser.parse_args(arguments).run
    with command_errors():
        where = write_bundle(run, read_text(run, CONFIG_FILE))
    sys.stdout.write(f"{where}\n")


@contextmanager
def bundle_on_crash(config: RunConfig, *, is_main: bool = True) -> Iterator[None]:
    """If an error ends the block that its message alone does not explain, leave a bundle.

    Args:
        config: of the run.
        is_main: this is the rank that writes files.

    Raises:
        Whatever the block raises, and nothing else.
    """
    try:
        yield
    except Exception as error:
        if is_main and is_crash(error) and not _has_bundle(error):
            try:
                note = f"{_NOTE} {write_bundle(config.output, to_json(config), error)}"
                error.add_note(note)
                log.warning("%s", note)
            except Exception as failure:  # the error that matters is raised below
                log.warning("There is no bundle for a bug report: %s", failure)
        raise


def is_crash(error: Exception) -> bool:
    """Whether more than its message may be needed to know what went wrong.

    That is not so of settings that are refused, and of a run that was asked to stop.
    """
    if isinstance(error, MissingObjectError) or hasattr(error, "exit_code"):
        return False
    if isinstance(error, StorageError | ShardError | DamageError):
        return True
    return not (isinstance(error, ValueError) and is_explained(error))


def _has_bundle(error: Exception) -> bool:
    return any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ()))


def write_bundle(run: str, config: str, error: Exception | None = None) -> str:
    """Write a bundle and return where: in the run folder, or else wherever it can be written.

    Args:
        run: the run folder.
        config: its settings, as config.json has them.
        error: that ended it.

    Raises:
        OSError: it can be written nowhere.
    """
    secrets = Secrets(os.environ)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in _found_out({CONFIG_FILE: lambda: config, **_parts(run, error)}).items():
            bundle.writestr(name, secrets.left_out_of(text))
    name = f"{datetime.now(UTC).strftime(FILE_TIME)}.zip"
    try:
        write_bytes(run, f"{CRASH_FOLDER}/{name}", content.getvalue())
    except (StorageError, OSError) as failure:
        log.warning("%s", failure)
        return _write_elsewhere(f"tmu-dist-crash-{name}", content.getvalue())
    return join_url(str(local_path(run) or located(run)), f"{CRASH_FOLDER}/{name}")


def _write_elsewhere(name: str, content: bytes) -> str:
    """To the current folder, unless Ray deletes it after the job; or among temporary files."""
    here, temporary = Path.cwd() / name, Path(tempfile.gettempdir()) / name
    if not is_in_job():
        with suppress(OSError):
            here.write_bytes(content)
            return str(here)
    temporary.write_bytes(content)
    return str(temporary)


def _found_out(parts: Mapping[str, Part]) -> dict[str, str]:
    """What each part says, or why it does not."""
    found = dict.fromkeys(parts, f"not found out in {_PATIENCE_SECONDS:g} s\n")
    for name, end in side_by_side(parts, seconds=_PATIENCE_SECONDS).items():
        if isinstance(end, Exception):  # the other parts are better than none
            end = f"not found out: {type(end).__name__}: {end}\n"
        found[name] = end
    return found


# What is found out


def _parts(run: str, error: Exception | None) -> dict[str, Part]:
    """By file name, all but the settings."""
    return {
        "error.txt": lambda: "".join(traceback.format_exception(error)) if error else "none\n",
        "command.json": partial(_command, run),
        "packages.txt": lambda: "".join(
            sorted(f"{d.name}=={d.version}\n" for d in distributions())
        ),
        "environment.txt": _environment,
        "machine.json": partial(_machine, run),
        "gpus.txt": partial(_said_by, "nvidia-smi"),
        "ray.json": _ray,
        PROVENANCE_FILE: partial(read_text, run, PROVENANCE_FILE),
        LOG_FILE: partial(_last_lines, run, LOG_FILE),
        "ranks.txt": partial(_ranks, run),
    }


def _command(run: str) -> str:
    return _json(
        {
            "run": run,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command_line(),
            "folder": str(Path.cwd()),
            "git_revision": git_revision(),
            "source": source_hash(),
            "python": sys.version,
            "platform": platform.platform(),
        }
    )


def _environment() -> str:
    named = ((name, os.environ[name]) for name in sorted(os.environ))
    return "".join(
        f"{name}={_LEFT_OUT if _SECRET_NAME.search(name) else value}\n"
        for name, value in named
        if name.startswith(_VARIABLES)
    )


def _machine(run: str) -> str:
    folders = (local_path(run), Path(tempfile.gettempdir()), Path("/dev/shm"))
    processes = _said_by("ps", "-eo", "pid,ppid,rss,etime,comm", "--sort=-rss")
    return _json(
        {
            "host": platform.node(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg(),
            "memory": Path("/proc/meminfo").read_text().splitlines(),
            "disks": {
                str(folder): shutil.disk_usage(folder)._asdict()
                for folder in folders
                if folder is not None and folder.exists()
            },
            "largest_processes": processes.splitlines()[:30],
        }
    )


def _said_by(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS)
    return done.stdout + done.stderr


def _ray() -> str:
    """The cluster of this process, or of RAY_ADDRESS; none is started for it."""
    if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
        return "this process is in no Ray cluster; where there is one, set RAY_ADDRESS\n"
    from tmu_dist.training.ray_cluster import cluster_state

    return _json(cluster_state())


def _ranks(run: str) -> str:
    """The last lines of what each rank said since its last start."""
    paths = newest_logs(run)
    with ThreadPoolExecutor(_READERS) as pool:  # a store takes its time for each
        texts = pool.map(partial(_last_lines, run), paths)
        return "".join(f"== {path}\n{text}\n" for path, text in zip(paths, texts, strict=True))


def _last_lines(run: str, path: str) -> str:
    size = object_size(run, path)
    last = min(size, _LAST_BYTES)
    text = bytes(read_range(run, path, size - last, last)).decode(errors="replace") if last else ""
    return "".join(text.splitlines(keepends=True)[-_LAST_LINES:])


def _json(facts: Any) -> str:
    return json.dumps(facts, indent=2, default=str) + "\n"


# What is left out

_LEFT_OUT = "(left-out)"
_SECRET_NAME = re.compile(
    r"key|secret|token|passw|credential|signature|connection_string|_sas", re.IGNORECASE
)
"""Names of variables whose values nobody is to see."""
_SECRET_IN_TEXT = (
    (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", _LEFT_OUT),
    (r"(\w://)[^\s/\"'<>]*@", rf"\1{_LEFT_OUT}@"),  # https://name:password@host
    (r"(\w://[^\s?\"'<>]*\?)[^\s\"'<>]+", rf"\1{_LEFT_OUT}"),  # https://host/file?signature=...
    (r"[^\s/@:\"'=]+:[^\s/@\"']+@(?=[\w.])", f"{_LEFT_OUT}@"),  # name:password@proxy
    (r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", rf"\1 {_LEFT_OUT}"),
    (r"\b(AKIA|ASIA)[A-Z0-9]{16}\b", _LEFT_OUT),
    (
        # name=value, name: value, "name": "value", also with \" for ", as in JSON within JSON
        r"(\b[\w.-]*(?:secret|token|passw|credential|signature|[a-z_-]key|connection_string|_sas)"
        r"[\w-]*(?P<end>\\*[\"'])?\s*[:=]\s*)(?:(?P<quote>\\*[\"']).*?(?P=quote)|[^\s\"',;&)}\]]+)",
        rf"\1{_LEFT_OUT}",
    ),
)
"""What looks like a secret, and what stands in its place."""
_SHORTEST = 6
"""A secret value of fewer letters is not looked for by itself: it stands in many words."""


class Secrets:
    """What must not be in a text that is given away.

    Args:
        variables: of the environment; values of those with the name of a secret are left out
            wherever they stand.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._values = set(_spellings(_secret_values(variables)))

    def left_out_of(self, text: str) -> str:
        """The text without them."""
        for value in sorted(self._values, key=len, reverse=True):
            text = text.replace(value, _LEFT_OUT)
        for pattern, instead in _SECRET_IN_TEXT:
            text = re.sub(pattern, instead, text, flags=re.IGNORECASE | re.DOTALL)
        return text


def _secret_values(variables: Mapping[str, str]) -> Iterator[str]:
    yield from (value for name, value in variables.items() if _SECRET_NAME.search(name))
    kept = variables.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
    with suppress(OSError, RuntimeError):
        yield Path(kept).expanduser().read_text().strip()


def _spellings(values: Iterable[str]) -> Iterator[str]:
    """As they stand in plain text, JSON and URLs."""
    for value in values:
        if len(value) >= _SHORTEST:
            yield from (value, json.dumps(value)[1:-1], quote(value), quote(value, safe=""))
