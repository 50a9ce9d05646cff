"""What is not loaded before the first step is done, so that it stays quick."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.startup import marks
from benchmarks.startup.__main__ import read_marks, start
from benchmarks.startup.report import STAGES, stages
from tmu_dist.config import RunConfig, to_json

ROOT = Path(__file__).parents[2]
NOT_FOR_THE_FIRST_STEP = {
    "IPython",
    "boto3",
    "cv2",
    "data_prep",
    "matplotlib",
    "pandas",
    "pyarrow",
    "ray",
    "scipy",
    "skimage",
    "tensorboard",
    "torch.utils.tensorboard",
    "torchvision",
    "webdataset",
    "zarr",
}
FIRST_STEP = """
import json, sys
from tmu_dist import train
from tmu_dist.training.loop import Run

advance = Run.advance

def advance_once(*given):
    advance(*given)
    print(json.dumps(sorted(sys.modules)))
    raise SystemExit

Run.advance = advance_once
train.main(sys.argv[1:])
"""
IMPORTS = """
import json, sys
import tmu_dist.training.launch, tmu_dist.training.loop

print(json.dumps(sorted(sys.modules)))
"""
NOT_FOR_IMPORTS = {"sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"}
"""Loaded by torch when it makes an optimiser, which not all who import the loop do."""
RAY_COMMAND = """
import json, sys
import tmu_dist.train, tmu_dist.training.launch, tmu_dist.training.ray_cluster

before_ray_starts = sorted(sys.modules)
import tmu_dist.training.ray_worker

print(json.dumps([before_ray_starts, sorted(sys.modules)]))
"""


ALL_PLACES = """
import functools, importlib
from benchmarks.startup.marks import PLACES

found = [
    functools.reduce(getattr, place.split("."), importlib.import_module(module)) and place
    for module, places in PLACES.items()
    for place in places
]
print(*found)
"""


def said_by(script: str, *arguments: str) -> str:
    """The last line that a fresh process prints."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_first_step_waits_for_no_library_that_it_does_not_use(
    tmu_config: RunConfig, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    launch = replace(tmu_config.launch, device="cpu")
    file.write_text(to_json(replace(tmu_config, launch=launch)))  # JSON is YAML, too
    loaded = set(
        json.loads(said_by(FIRST_STEP, "--recipe", "digits-scratch", "--config", str(file)))
    )
    assert {"torch", "numpy", "tmu_dist.training.loop"} <= loaded
    assert sorted(loaded & NOT_FOR_THE_FIRST_STEP) == []


def test_who_imports_the_loop_does_not_load_the_compiler() -> None:
    loaded = set(json.loads(said_by(IMPORTS)))
    assert sorted(loaded & (NOT_FOR_IMPORTS | NOT_FOR_THE_FIRST_STEP)) == []


def test_who_starts_workers_on_ray_does_not_load_what_they_need() -> None:
    """Ray's processes start while the command loads Ray Train; neither loads torch.

    What controls the workers unpickles `ray_group.RankConfig` and `ray_failures.LossRecord`, whose
    modules are among those that are looked at here.
    """
    pytest.importorskip("ray")
    first, second = map(set, json.loads(said_by(RAY_COMMAND)))
    assert "ray" in first
    assert sorted(first & {"torch", "pandas", "ray.data", "ray.train"}) == []
    assert {"ray.train", "tmu_dist.training.ray_group", "tmu_dist.training.ray_failures"} <= second
    assert sorted(second & {"torch", "tmu_dist.training.loop"}) == []


def test_a_local_start_comes_to_every_mark(tmu_config: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "student.yaml"
    training = replace(tmu_config.training, num_steps=1)
    file.write_text(
        to_json(replace(tmu_config, output=str(tmp_path / "student"), training=training))
    )
    found = start("local", file)
    spent = stages("local", found)
    assert all(seconds >= 0 for seconds in spent.values())
    assert sum(spent.values()) == pytest.approx(found["ends Run.advance"])


def test_all_marks_lie_at_functions_that_exist() -> None:
    pytest.importorskip("ray")
    assert said_by(ALL_PLACES).split() == [name for of in marks.PLACES.values() for name in of]
    marked = {
        f"{moment} {place}"
        for places in marks.PLACES.values()
        for place, when in places.items()
        for moment in (marks.BEGINS, marks.ENDS)
        if moment in when
    }
    assert {mark for launcher in STAGES.values() for mark in launcher} == marked


def test_of_ranks_the_slower_one_is_looked_at() -> None:
    lines = [
        "10.5 1 begins launch",
        "12.0 7 ends _join",
        "12.5 8 ends _join",
        "13.0 8 ends Run.advance",
        "13.5 7 ends Run.advance",
        "14.0 7 ends Run.advance",
        "14.1 8 ends Run.advance",
    ]
    found = read_marks("\n".join(lines), started=10.0)
    assert found == {"begins launch": 0.5, "ends _join": 2.0, "ends Run.advance": 3.5}
