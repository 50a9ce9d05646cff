"""The drill passes where a killed run continues right, and fails wherever it does not."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.s3_servers import moto
from tests.unit.test_training import run, run_until
from tmu_dist.config import ConfigError, RunConfig, TrainingConfig, to_json
from tmu_dist.run_folder import read_json
from tmu_dist.teachers.store import CARD_FILE, WEIGHTS_FILE, load_model, model_files
from tmu_dist.training import loop
from tmu_dist.verify_resume import __main__ as verify_resume
from tmu_dist.verify_resume.__main__ import Kill, plan
from tmu_dist.verify_resume.comparing import Check, Outcome, compare, newest_checkpoint, outcome_of
from tmu_dist.verify_resume.processes import DrillError

STEPS = 8
EXACT = ("steps missing or repeated", "position in the data")
LEARNED = ("losses of all steps", "validation scores", "final weights")


@pytest.fixture(autouse=True)
def workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drills set it for their own process."""
    monkeypatch.setenv("TMU_DIST_HOME", "nowhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def drill(config: RunConfig, folder: Path, *words: str, work: str | None = None) -> dict[str, Any]:
    """What a drill of a config finds, and the code it ends with."""
    settings, record = folder / "config.yaml", folder / "record.json"
    settings.write_text(yaml.safe_dump(json.loads(to_json(config))))
    words = ("--config", str(settings), "--work", work or str(folder / "work"), *words)
    with pytest.raises(SystemExit) as leaving:
        verify_resume.main([*words, "--json", str(record), "--timeout", "120"])
    found: dict[str, Any] = json.loads(record.read_text())
    assert leaving.value.code == (0 if found["passed"] else 1)
    return found


def failed(checks: list[Check]) -> set[str]:
    return {check.what for check in checks if not check.passed}


def test_a_drill_kills_twice_and_continues_at_another_size(
    tmu_config: RunConfig, tmp_path: Path
) -> None:
    words = shlex.split("--steps 12 --kill-after 4 7 --ranks 2 --then 2 1 --seed 3")
    found = drill(tmu_config, tmp_path, *words)
    assert found["passed"], found["checks"]
    assert [kill["after_step"] for kill in found["kills"]] == [4, 7]
    for kill in found["kills"]:
        assert kill["checkpoint_step"] <= kill["logged_step"] < 12
        assert kill["checkpoint_step"] % 2 == 0, "a checkpoint every two steps"
    differences = {(c["run"], c["what"]): c["difference"] for c in found["checks"]}
    assert all(differences["then-2", what] == 0 for what in (*EXACT, *LEARNED))
    assert differences["then-1", "losses of all steps"] < 1e-5
    starts = [
        read_json(f"{found['drill']['folder']}/{name}", "run.json")["starts"]
        for name in ("then-2", "then-1")
    ]
    assert [[start["world_size"] for start in each] for each in starts] == [[2, 2, 2], [2, 2, 1]]


def test_a_drill_with_sigterm_in_a_store(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moto() as server:
        server.use(monkeypatch)
        server.make_bucket("drills")
        words = shlex.split("--steps 80 --kill-after 14 --ranks 1 --then 1 --signal TERM")
        found = drill(tiny_config, tmp_path, *words, work="s3://drills/work")
    assert found["passed"], found["checks"]
    assert found["drill"]["folder"].startswith("s3://drills/work/drills/")
    (stop,) = found["kills"]
    assert stop["checkpoint_step"] == stop["logged_step"] % 80 >= 14
    assert next(check["what"] for check in found["checks"]) == "steps lost"


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_drill_finds_a_moved_position(
    is_moved: bool, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With runs in this process, so that what they are is not drilled here."""

    def run_here(drill: verify_resume.Drill, name: str, size: int) -> str:
        folder = f"{drill.folder}/{name}"
        if is_moved and name.startswith("then"):
            move_position(folder)
        run(replace(drill.config, output=folder, launch=tiny_config.launch))
        return folder

    def kill_here(drill: verify_resume.Drill, folder: str, step: int, seconds: float) -> Kill:
        run_until(replace(drill.config, output=folder, launch=tiny_config.launch), step)
        saved = int(str(newest_checkpoint(folder)).rpartition("-")[2])
        return Kill(after_step=step, logged_step=step, checkpoint_step=saved)

    monkeypatch.setattr(verify_resume, "run_on", run_here)
    monkeypatch.setattr(verify_resume, "kill", kill_here)
    words = shlex.split("--steps 8 --kill-after 5 --ranks 1 --then 1")
    found = drill(tiny_config, tmp_path, *words)
    missed = {check["what"] for check in found["checks"] if not check["passed"]}
    assert missed == ({"position in the data", *LEARNED} if is_moved else set())


def move_position(folder: str) -> None:
    """One batch of data is skipped."""
    edit_facts(folder, lambda facts: facts["progress"].update(consumed=4 + consumed(facts)))


def consumed(facts: dict[str, Any]) -> int:
    return int(facts["progress"]["consumed"])


def edit_facts(folder: str, edit: Callable[[dict[str, Any]], None]) -> None:
    file = Path(folder, str(newest_checkpoint(folder)), "training.json")
    facts = json.loads(file.read_text())
    edit(facts)
    file.write_text(json.dumps(facts))


def take_other_weights(folder: str) -> None:
    """Those of another seed, with the hashes that go with them."""
    checkpoint = f"{folder}/{newest_checkpoint(folder)}"
    card, model = load_model(checkpoint).card, load_model(checkpoint).model
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    files = model_files(model.state_dict(), card)
    for name in (WEIGHTS_FILE, CARD_FILE):
        Path(checkpoint, name).write_bytes(files[name])
    sha = json.loads(files[CARD_FILE])["weights_sha256"]
    edit_facts(folder, lambda facts: facts.update(weights_sha256=sha))


def log_a_step_twice(folder: str) -> None:
    log = Path(folder, "log.jsonl")
    lines = log.read_text().splitlines()
    first = next(line for line in lines if '"event": "train"' in line)
    log.write_text("\n".join([first, *lines]) + "\n")


@contextmanager
def other_masks() -> Iterator[None]:
    """Sampling masks that depend on when a run was started."""
    drawn = loop.sampling_mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop, "sampling_mask", lambda *a, seed, step: drawn(*a, seed=seed + 1, step=step)
        )
        yield


@pytest.fixture
def half(tiny_config: RunConfig) -> tuple[RunConfig, Outcome]:
    """A run that stopped in the middle, and what one that did not stop found."""
    training: TrainingConfig = replace(tiny_config.training, num_steps=STEPS)
    straight = replace(tiny_config, training=training, output=f"{tiny_config.output}-straight")
    run(straight)
    config = replace(straight, output=tiny_config.output)
    run_until(config, 5)
    return config, outcome_of(straight.output)


@pytest.mark.parametrize(
    ("tamper", "finds"),
    [
        (lambda folder: None, set()),
        (move_position, {"position in the data", *LEARNED}),
        (take_other_weights, set(LEARNED)),
        (log_a_step_twice, {"steps missing or repeated"}),
    ],
)
def test_what_was_tampered_with_is_found(
    half: tuple[RunConfig, Outcome], tamper: Callable[[str], None], finds: set[str]
) -> None:
    config, expected = half
    tamper(config.output)
    run(config)
    found = outcome_of(config.output)
    assert failed(compare("then", expected, found, tolerance=0.0)) == finds
    # What another number of ranks may differ by hides none of it.
    tolerated = finds - failed(compare("then", expected, found, tolerance=1e-4))
    assert tolerated <= {"validation scores", "final weights"}


def test_other_masks_are_found(half: tuple[RunConfig, Outcome]) -> None:
    config, expected = half
    with other_masks():
        run(config)
    found = outcome_of(config.output)
    assert failed(compare("then", expected, found, tolerance=0.0)) == set(LEARNED)
    assert failed(compare("then", expected, found, tolerance=1e-4)) >= {"losses of all steps"}


LOSSES = {1: {"loss/total": 4.0, "loss/a": 0.5}, 2: {"loss/total": 2.0, "loss/a": 0.0}}


def outcome(**changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "steps": [1, 2],
        "losses": LOSSES,
        "scores": {2: {"mse_per_frame": 8.0}},
        "position": {"consumed": 8, "seed": 0},
        "weights": {"w": torch.tensor([0.5, -2.0]), "zero": torch.zeros(2)},
        "from_step": 1,
        "world_size": 1,
        "device": "cpu",
    }
    return Outcome(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "what", "difference"),
    [
        ({"steps": [1]}, "steps missing or repeated", 1),
        ({"steps": [1, 2, 2, 3]}, "steps missing or repeated", 2),
        ({"position": {"consumed": 9, "seed": 1}}, "position in the data", 2),
        ({"losses": {1: {"loss/total": 4.0}}}, "losses of all steps", math.inf),
        (
            {
                "losses": {
                    1: {"loss/total": 4.0, "loss/a": 0.5},
                    2: {"loss/total": 2.0, "loss/a": 1},
                }
            },
            "losses of all steps",
            0.5,
        ),
        ({"scores": {2: {"mse_per_frame": 7.0}}}, "validation scores", 0.125),
        ({"scores": {2: {"mse_per_frame": math.nan}}}, "validation scores", math.nan),
        ({"scores": {}}, "validation scores", math.inf),
        ({"weights": {"w": torch.tensor([0.5, -2.5]), "zero": torch.zeros(2)}}, LEARNED[2], 0.25),
        ({"weights": {"w": torch.tensor([0.5, -2.0])}}, LEARNED[2], math.inf),
    ],
)
def test_differences_are_those_by_hand(
    changes: dict[str, Any], what: str, difference: float
) -> None:
    checks = compare("other", outcome(), outcome(**changes), tolerance=1e-3)
    assert failed(checks) == {what}
    found = next(check for check in checks if check.what == what)
    assert found.difference == pytest.approx(difference, nan_ok=True)
    assert str(found).startswith("FAIL  other")


def planned(config: RunConfig, *words: str) -> verify_resume.Drill:
    own, _ = verify_resume._own_flags().parse_known_args(words)
    return plan(own, config)


def test_moments_come_from_the_seed(tiny_config: RunConfig) -> None:
    drills = [planned(tiny_config, "--seed", str(seed), "--steps", "30") for seed in range(40)]
    assert drills[7].kill_after == planned(tiny_config, "--seed", "7", "--steps", "30").kill_after
    moments = {each.kill_after[0] for each in drills}
    assert len(moments) > 8
    assert min(moments) > 2 * 5 and max(moments) < 27, "after the second checkpoint, and in time"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--steps 4", "--steps >= 5"),
        ("--ranks 0", "at least one rank"),
        ("--then 1 0", "at least one rank"),
        ("--steps 12 --kill-after 2", "3 to 11"),
        ("--steps 12 --kill-after 12", "3 to 11"),
        ("--steps 12 --kill-after 9 5", "ascending"),
    ],
)
def test_a_drill_that_would_show_nothing_is_refused(
    tiny_config: RunConfig, words: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        planned(tiny_config, *words.split())


def test_a_run_that_fails_by_itself_is_no_failure_of_resuming(
    tiny_config: RunConfig, tmp_path: Path
) -> None:
    drill = planned(tiny_config, "--work", str(tmp_path), "--timeout", "60", "--ranks", "1")
    nowhere = replace(tiny_config.data, url=str(tmp_path / "ghost"))
    broken = replace(drill, config=replace(drill.config, data=nowhere))
    with pytest.raises(DrillError, match="ghost"):
        verify_resume.run_on(broken, "straight", 1)
    with pytest.raises(DrillError, match="ended before it was killed"):
        verify_resume.kill(broken, str(tmp_path / "killed"), 4, 0.0)
