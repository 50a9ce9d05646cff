"""Writes down when a starting run gets where, in all of its processes.

A copy of this file is `sitecustomize.py` in a folder of PYTHONPATH, so every process of Python
loads it first. It follows imports and wraps the functions between which the stages lie; nothing of
the project is changed, and nothing is imported earlier than it would be.
"""

from __future__ import annotations

import functools
import importlib.machinery
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

FILE = "TMU_DIST_STARTUP_MARKS"
"""Variable with the file that marks are added to: lines of seconds, process and name."""
BEGINS, ENDS = "begins", "ends"
PLACES = {
    "tmu_dist.training.launch": {"launch": BEGINS},
    "tmu_dist.training.ray_cluster": {"connect_for": ENDS},
    "tmu_dist.training.ray_worker": {"train_on_ray": BEGINS},
    "tmu_dist.training.ray_group": {"_join": BEGINS + ENDS},
    "tmu_dist.training.loop": {
        "Run.__init__": BEGINS,
        "open_loaders": ENDS,
        "prepare_transfer": ENDS,
        "Run._prepare_parts": ENDS,
        "build_step": ENDS,
        "Run.start": ENDS,
        "Run._check_liveness": ENDS,
        "Run.advance": ENDS,
    },
}
"""Functions by module, and whether their begin or end is a mark, `begins NAME` or `ends NAME`."""


def mark(name: str) -> None:
    """Write down that this process is there; whole lines, whoever else writes."""
    line = f"{time.time():.4f} {os.getpid()} {name}\n"
    file = os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)


class Follower(MetaPathFinder):
    """Finds nothing itself, but wraps the functions of what others find."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in PLACES:
            return None
        others = (each.find_spec for each in sys.meta_path if each is not self)
        spec = next(filter(None, (find(name, path, target) for find in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _then_wrap(spec.loader)  # type: ignore[method-assign]
        return spec


def _then_wrap(loader: Loader) -> Callable[[ModuleType], None]:
    execute = loader.exec_module

    def execute_and_wrap(module: ModuleType) -> None:
        execute(module)
        for place, when in PLACES[module.__name__].items():
            *classes, name = place.split(".")
            holder = functools.reduce(getattr, classes, module)
            setattr(holder, name, _marked(getattr(holder, name), place, when))

    return execute_and_wrap


def _marked(function: Callable[..., Any], name: str, when: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def marked(*given: Any, **named: Any) -> Any:
        if BEGINS in when:
            mark(f"{BEGINS} {name}")
        found = function(*given, **named)
        if ENDS in when:
            mark(f"{ENDS} {name}")
        return found

    return marked


if FILE in os.environ:
    sys.meta_path.insert(0, Follower())
