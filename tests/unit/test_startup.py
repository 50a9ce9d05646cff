"""What is not loaded before the first step is done, so that it stays quick."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

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
