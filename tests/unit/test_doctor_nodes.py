"""What the doctor says of nodes: each judgement on facts, and facts on real folders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.faulty_server import faulty_server
from tmu_dist.config import RunConfig
from tmu_dist.data import storage
from tmu_dist.doctor import __main__ as command
from tmu_dist.doctor import examination, places
from tmu_dist.doctor.findings import CHECKS, Finding, Status
from tmu_dist.doctor.node_judgements import judge_nodes, judge_token
from tmu_dist.doctor.nodes import CacheFacts, GpuFacts, NodeFacts, look_at_cache, look_at_node
from tmu_dist.doctor.places import Place, PlaceFacts, Rate, Wanted, marked, wanted_of
from tmu_dist.workspace import WORKSPACE

VERSIONS = {"python": "3.12.1", "torch": "2.8.0", "numpy": "2.0", "source": "aaa", "driver": "570"}
ARCHIVE = Place(setting="data.url", url="s3://lab/archive", use="archive", marks=("manifest.json",))
OUTPUT = Place(setting="output", url="/nfs/run", use="output")
GPU = GpuFacts(name="H200", total_bytes=140 * 2**30, free_bytes=139 * 2**30)
FAST = Rate(num_bytes=2**26, seconds=0.1)


def nodes(change: dict[int, dict[str, Any]], number: int = 3) -> list[NodeFacts]:
    """Equal nodes 10.0.0.0, 10.0.0.1, ..., some with other facts."""
    usual = NodeFacts(
        address="",
        host="",
        versions=VERSIONS,
        gpus=(GPU,),
        promised_gpus=1,
        cache=CacheFacts(folder="/cache", room_bytes=10 * 2**30),
        places=(
            PlaceFacts(place=ARCHIVE, read=FAST, copied_bytes=8 * 2**30, largest_bytes=2**30),
            PlaceFacts(place=OUTPUT, read=FAST, write=FAST),
        ),
        clock_offset_seconds=0.01,
        clock_uncertainty_seconds=0.02,
        has_authentication=True,
    )
    return [
        replace(usual, address=f"10.0.0.{each}", **change.get(each, {})) for each in range(number)
    ]


def judged(
    facts: Sequence[NodeFacts], silent: dict[str, str] | None = None, *, wants_gpu: bool = False
) -> list[Finding]:
    return judge_nodes(facts, silent or {}, asking=VERSIONS, wants_gpu=wants_gpu)


def statuses(findings: Sequence[Finding]) -> dict[str, Status]:
    """Of the checks, each of which has one finding."""
    found = {finding.check: finding.status for finding in findings if finding.status != "ok"}
    return found


def test_equal_nodes_are_healthy() -> None:
    findings = judged(nodes({}), wants_gpu=True)
    assert [finding.status for finding in findings] == ["ok"] * 7
    assert {f.check for f in findings} == {"nodes", "versions", "gpus", "clock", "cache", "storage"}
    assert "3 x H200" in findings[2].found
    assert judge_token(nodes({}), "10.0.0.0:6379", is_own=False)[0].status == "ok"
    json.dumps([asdict(node) for node in nodes({})])  # facts are plain values


OTHER_SOURCE = {"versions": {**VERSIONS, "source": "bbb"}}
PLANTED: dict[str, tuple[dict[int, dict[str, Any]], str, Status, str, str]] = {
    "another checkout": (
        {1: OTHER_SOURCE}, "versions", "fault", "10.0.0.1", "source bbb, not aaa"
    ),
    "another torch": (
        {2: {"versions": {**VERSIONS, "torch": "2.7.1"}}},
        "versions", "fault", "10.0.0.2", "torch 2.7.1, not 2.8.0",
    ),
    "another numpy": (
        {0: {"versions": {**VERSIONS, "numpy": "1.9"}}},
        "versions", "warning", "10.0.0.0", "numpy 1.9, not 2.0",
    ),
    "another driver": (
        {0: {"versions": {**VERSIONS, "driver": "535"}}},
        "versions", "warning", "10.0.0.0", "driver 535, not 570",
    ),
    "no GPU seen": (
        {1: {"gpus": (), "gpu_error": "torch is built without CUDA"}},
        "gpus", "fault", "10.0.0.1", "promises 1 GPUs, torch sees 0 (torch is built without CUDA)",
    ),
    "GPU that Ray does not know of": (
        {1: {"gpus": (GPU, GPU)}}, "gpus", "warning", "10.0.0.1", "sees 2 GPUs, Ray promises 1"
    ),
    "broken GPU": (
        {1: {"gpus": (replace(GPU, error="uncorrectable ECC error"),)}},
        "gpus", "fault", "10.0.0.1", "ECC",
    ),
    "busy GPU": (
        {1: {"gpus": (replace(GPU, free_bytes=2**30),)}},
        "gpus", "warning", "10.0.0.1", "139 GiB of 140 GiB are in use",
    ),
    "clock ahead": (
        {1: {"clock_offset_seconds": 90.0}}, "clock", "fault", "10.0.0.1", "90.0 s ahead"
    ),
    "clock behind": (
        {1: {"clock_offset_seconds": -2.0}}, "clock", "warning", "10.0.0.1", "2.0 s behind"
    ),
    "small cache": (
        {2: {"cache": CacheFacts(folder="/cache", room_bytes=2**31)}},
        "cache", "warning", "10.0.0.2", "2 GiB of the 8 GiB",
    ),
    "no cache": (
        {2: {"cache": CacheFacts(folder="/cache", room_bytes=2**20)}},
        "cache", "fault", "10.0.0.2", "less than one shard (1 GiB)",
    ),
    "cache that cannot be used": (
        {2: {"cache": CacheFacts(folder="/cache", error="/cache is a file")}},
        "cache", "fault", "10.0.0.2", "/cache is a file",
    ),
    "slow store": (
        {1: {"places": (PlaceFacts(place=ARCHIVE, read=Rate(num_bytes=2**21, seconds=2.0)),)}},
        "storage", "warning", "10.0.0.1", "read with 1 MB/s",
    ),
    "slower than others": (
        {1: {"places": (PlaceFacts(place=ARCHIVE, read=Rate(num_bytes=2**25, seconds=1.0)),)}},
        "storage", "warning", "10.0.0.1", "median node: 671 MB/s",
    ),
    "folder that others see": (
        {1: {"places": (PlaceFacts(place=OUTPUT, is_there=False),)}},
        "storage", "fault", "10.0.0.1", "does not see /nfs/run",
    ),
    "no rights": (
        {1: {"places": (PlaceFacts(place=OUTPUT, error="403 AccessDenied"),)}},
        "storage", "fault", "10.0.0.1", "output: 403 AccessDenied",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_odd_about_a_node_is_named(name: str) -> None:
    change, check, status, where, found = PLANTED[name]
    findings = judged(nodes(change))
    assert statuses(findings) == {check: status}
    (odd,) = [finding for finding in findings if finding.status == status]
    assert odd.where == where
    assert found in odd.found
    assert odd.advice


def test_a_clock_that_may_be_right_is_not_blamed() -> None:
    late = {"clock_offset_seconds": 3.0, "clock_uncertainty_seconds": 2.5}
    assert statuses(judged(nodes({1: late}))) == {}


def test_a_node_without_gpus_needs_no_driver() -> None:
    head = {"gpus": (), "promised_gpus": 0, "versions": {**VERSIONS, "driver": "none"}}
    assert statuses(judged(nodes({0: head}))) == {}
    assert statuses(judged(nodes(dict.fromkeys(range(3), head)))) == {"gpus": "skipped"}
    assert statuses(judged(nodes(dict.fromkeys(range(3), head)), wants_gpu=True)) == {
        "gpus": "fault"
    }


def test_the_command_itself_is_compared() -> None:
    findings = judge_nodes(nodes({}), {}, asking=OTHER_SOURCE["versions"], wants_gpu=False)
    assert (findings[1].status, findings[1].where) == ("fault", "this command")


def test_the_same_on_all_nodes_is_told_once_and_of_silent_ones_by_name() -> None:
    lacks = {"places": (PlaceFacts(place=ARCHIVE, is_there=False, error="There is nothing."),)}
    findings = judged(nodes(dict.fromkeys(range(3), lacks)), {"10.0.0.9": "it took too long."})
    (missing,) = [finding for finding in findings if finding.check == "storage"]
    assert (missing.status, missing.where) == ("fault", "")
    assert "data_prep" in missing.advice
    (silent,) = [finding for finding in findings if finding.where == "10.0.0.9"]
    assert silent.status == "fault" and "took too long" in silent.found


@pytest.mark.parametrize(
    ("listens_at", "is_own", "status"),
    [
        ("10.0.0.1:6379", False, "fault"),
        ("10.0.0.1:6379", True, "ok"),
        ("127.0.0.1:6379", False, "ok"),
        ("[::1]:6379", False, "ok"),
        ("head.lab:6379", False, "fault"),
    ],
)
def test_who_reaches_a_cluster_must_show_a_token(
    listens_at: str, is_own: bool, status: Status
) -> None:
    (finding,) = judge_token(nodes({1: {"has_authentication": False}}), listens_at, is_own=is_own)
    assert finding.status == status
    assert ("10.0.0.1" in finding.found) == (status == "fault")


# Facts


def of(facts: Sequence[PlaceFacts], setting: str) -> PlaceFacts:
    (found,) = [each for each in facts if each.place.setting == setting]
    return found


def test_a_healthy_run_is_seen_as_one_and_nothing_stays(tmu_config: RunConfig) -> None:
    wanted = wanted_of(tmu_config)
    with marked(wanted) as asked:
        assert asked.is_marked
        node = look_at_node(asked, "here")
    assert not Path(tmu_config.output).exists()
    assert [facts.error for facts in node.places] == [""] * 4
    assert all(facts.is_there and facts.read for facts in node.places)
    assert node.cache is None
    assert statuses(judge_nodes([node], {}, asking=node.versions, wants_gpu=False)) == {
        "gpus": "skipped",
        "clock": "skipped",
        "cache": "skipped",
    }


def test_a_folder_that_others_write_but_this_node_does_not_see(tmu_config: RunConfig) -> None:
    other = replace(wanted_of(tmu_config), is_marked=True)
    facts = of(places.look_at_places(other), "output")
    assert not facts.is_there and not facts.error
    assert not Path(tmu_config.output).exists()


def test_each_node_reads_another_shard_and_finds_it_damaged(
    tmu_config: RunConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "archive"
    for path in storage.list_paths(tmu_config.data.url):
        storage.write_bytes(str(folder), path, storage.read_bytes(tmu_config.data.url, path))
    shards = sorted((folder / "train").glob("*.tar"))
    shards[1].write_bytes(shards[1].read_bytes()[:-1] + b"x")
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    config = replace(tmu_config, data=replace(tmu_config.data, url=str(folder)))
    errors = [
        of(places.look_at_places(replace(wanted_of(config), number=number)), "data.url").error
        for number in range(3)
    ]
    assert errors[0] == ""
    assert shards[1].name in errors[1] and "not what the manifest says" in errors[1]
    assert shards[2].name in errors[2] and "bytes" in errors[2]


def test_what_is_not_there_or_not_to_be_written(tmu_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = replace(
        tmu_config,
        output=str(tmp_path / "file" / "run"),
        data=replace(tmu_config.data, url=str(tmp_path / "nothing")),
        transfer=replace(tmu_config.transfer, teachers=(str(tmp_path / "nobody"),)),
    )
    with marked(wanted_of(config)) as asked:
        assert not asked.is_marked
        facts = places.look_at_places(asked)
    assert not of(facts, "data.url").is_there and "nothing" in of(facts, "data.url").error
    assert not of(facts, "transfer.teachers").is_there
    assert of(facts, "output").is_there and "file/run" in of(facts, "output").error


@pytest.mark.parametrize(("fault", "told"), [(403, "403"), ("silent", "no answer within 1 s")])
def test_a_store_that_refuses_or_never_answers(
    tmu_config: RunConfig, monkeypatch: pytest.MonkeyPatch, fault: int | str, told: str
) -> None:
    if fault == "silent":
        monkeypatch.setattr(places, "_PLACE_SECONDS", 1.0)
    with faulty_server(fault=lambda number: fault) as server:
        config = replace(tmu_config, data=replace(tmu_config.data, url=f"{server.url}/archive"))
        facts = places.look_at_places(wanted_of(config))
    assert told in of(facts, "data.url").error
    assert of(facts, "output").error == ""  # the others are not held up


def test_the_cache_is_tried_where_a_run_would_use_it(tmp_path: Path) -> None:
    wanted = Wanted(places=(ARCHIVE,), cache_folder=str(tmp_path / "cache"), cache_gib=1.0)
    assert wanted.copies
    facts = look_at_cache(wanted)
    assert (facts.error, facts.room_bytes) == ("", 2**30)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").touch()
    facts = look_at_cache(replace(wanted, cache_folder=str(tmp_path / "file")))
    assert "data.cache_folder" in facts.error
    assert not replace(wanted, reading="range").copies
    local = replace(ARCHIVE, url="/archive")
    assert not replace(wanted, places=(local,)).copies
    assert replace(wanted, places=(local,), reading="cache").copies


# The command


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: str) -> tuple[int, str]:
        code: Any = 0
        try:
            command.main(arguments)
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    return run


def test_importing_the_facts_loads_no_ray_and_help_no_torch() -> None:
    check = (
        "import sys, tmu_dist.doctor.places, tmu_dist.doctor.nodes;"
        "assert not {'ray', 'torch'} & set(sys.modules), 'loaded'"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_wrong_flags_end_with_2(doctor: Callable[..., tuple[int, str]]) -> None:
    assert doctor("--launcher", "local", "--no-such-flag", "1")[0] == 2
    assert doctor("--recipe", "no-such-recipe")[0] == 2


def test_what_training_makes_first_is_only_a_warning(
    doctor: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(WORKSPACE, raising=False)
    code, shown = doctor("--launcher", "local", "--json")
    record = json.loads(shown)
    assert (code, record["healthy"]) == (0, True)
    warnings = [f for f in record["findings"] if f["status"] == "warning"]
    assert [f["check"] for f in warnings] == ["storage", "teachers", "teachers"]
    assert "python -m data_prep moving-mnist" in warnings[0]["advice"]
    assert "digits-teacher-1 is not trained yet" in warnings[1]["found"]
    assert list(tmp_path.iterdir()) == []


def test_an_unexpected_error_is_a_fault_and_hides_nothing(
    doctor: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(examination, "look_at_node", lambda *_: 1 / 0)
    file = tmp_path / "found.json"
    code, shown = doctor("--launcher", "local", "--json", str(file))
    assert code == 1
    record = json.loads(file.read_text())
    (fault,) = [f for f in record["findings"] if f["status"] == "fault"]
    assert "ZeroDivisionError" in fault["found"] and "test_doctor_nodes.py" in fault["found"]
    assert {f["check"] for f in record["findings"]} == set(CHECKS)
    assert "Not ready to train: 1 fault, 3 warnings" in shown


def test_outside_of_a_cluster_only_this_machine_is_looked_at(
    doctor: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    code, shown = doctor("--launcher", "ray", "--json")
    by_check = {f["check"]: f for f in json.loads(shown)["findings"]}
    assert code == 1
    assert by_check["address"]["status"] == "fault"
    for check in ("nodes", "storage", "exchange", "step"):
        assert by_check[check]["status"] == "skipped"
        assert "ray job submit" in by_check[check]["found"]
