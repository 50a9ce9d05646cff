"""The commands of cluster/README.md are real: recipes, flags, knobs, and what they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from tmu_dist.evaluate import main as evaluate
from tmu_dist.train import parse_command
from tuning.search import parse as parse_search

ROOT = Path(__file__).parents[2]
README = (ROOT / "cluster/README.md").read_text()
JOBS = [
    command.replace("`", "")
    for command in re.findall(r"(?:`S|--working-dir \.) -- (python [^`\n]+)", README)
]


def test_there_is_a_job_of_every_kind() -> None:
    modules = {shlex.split(job)[2] for job in JOBS if " -m " in job}
    assert {"tmu_dist.train", "tmu_dist.evaluate", "tmu_dist.doctor", "data_prep"} <= modules
    assert any("tuning/search.py" in job for job in JOBS)


@pytest.mark.parametrize("job", JOBS)
def test_jobs_are_understood(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    match shlex.split(job):
        case ["python", "-m", "tmu_dist.train" | "tmu_dist.doctor", *words]:
            parse_command([word for word in words if word not in ("--config", "my_run.yaml")])
        case ["python", "tuning/search.py", "status", _]:
            pass
        case ["python", "tuning/search.py", *words]:
            parse_search(words)
        case ["python", "-m", "tmu_dist.evaluate" | "data_prep" as module, *words]:
            command = evaluate if module == "tmu_dist.evaluate" else data_prep
            subcommand = words[: module == "data_prep"]
            with pytest.raises(SystemExit):
                command([*subcommand, "--help"])
            shown = capsys.readouterr().out
            assert all(word in shown for word in words if word.startswith("--"))
        case _:
            pytest.fail(f"nobody tries {job}")


@pytest.mark.parametrize("file", sorted(set(re.findall(r"render\.py (cluster/\w+\.yaml)", README))))
def test_knobs_are_those_of_the_file(file: str) -> None:
    from cluster.render import knobs_of

    known = knobs_of((ROOT / file).read_text())
    (command,) = re.findall(rf"render\.py {file} ([^>]+)>", README)
    used = re.findall(r"--([\w-]+)", command)
    assert used and set(used) <= set(known)
