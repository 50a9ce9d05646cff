"""Which code runs, by which command: what runs, model cards, pages and bug reports say of it."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

_PACKAGES = ("tmu_dist", "data_prep", "tuning")


def command_line() -> str:
    """Of this process, to be given again in the same folder."""
    return shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])


def git_revision() -> str:
    """Commit of the code that runs, with "+changes" if files differ from it; or "unknown"."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def source_hash() -> str:
    """Of the contents of the project's Python files, 12 digits: also where there is no git."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for file in sorted(Path(folder).rglob("*.py")):
                name = f"{package}/{file.relative_to(folder).as_posix()}"
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()[:12]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of installed packages, by name; "not installed" where they are not."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
