"""Weights at a URL are fetched once for all processes of a node, and proven whole all the same."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.object_server import ObjectServer, object_server
from tmu_dist.config import RunConfig
from tmu_dist.data import cache as cache_module
from tmu_dist.data.cache import NodeCache
from tmu_dist.data.storage import write_bytes
from tmu_dist.teachers.card import TeacherError
from tmu_dist.teachers.store import load_card, load_model, load_weights, locate
from tmu_dist.training.launch import launch

WEIGHTS = "teacher/weights.safetensors"


@pytest.fixture
def server(
    teacher_runs: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectServer]:
    """It has the first teacher, in the folder `teacher`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(cache_module, "_RETRY_SECONDS", 0.001)
    with object_server() as running:
        for file in Path(locate(teacher_runs[0])).iterdir():
            running.objects[f"teacher/{file.name}"] = file.read_bytes()
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "copies", 2**20)


def sum_of_weights(url: str, cache: NodeCache) -> float:
    """In a process of its own."""
    _, weights = load_weights(url, cache=cache)
    return sum(float(values.double().sum()) for values in weights.values())


def test_two_processes_fetch_once(
    server: ObjectServer, cache: NodeCache, teacher_runs: tuple[str, str]
) -> None:
    url = f"{server.url}/teacher"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        sums = list(processes.map(sum_of_weights, [url] * 2, [cache] * 2))
    assert sums == [sum_of_weights(teacher_runs[0], cache)] * 2
    assert server.gets[WEIGHTS] == 1
    assert [file.name for file in cache.folder.iterdir()] == [
        load_card(teacher_runs[0]).weights_sha256
    ]
    load_weights(url)
    assert server.gets[WEIGHTS] == 2, "without a cache as ever"


def test_runs_share_their_teachers(
    server: ObjectServer, tmu_config: RunConfig, tmp_path: Path
) -> None:
    """As teachers beside the student, and as a start; and they learn what they did before."""

    def weights_after(name: str, address: str, **data: Any) -> dict[str, torch.Tensor]:
        config = replace(
            tmu_config,
            output=str(tmp_path / name),
            data=replace(tmu_config.data, **{"cache_folder": str(tmp_path / "node"), **data}),
            training=replace(tmu_config.training, num_steps=2),
            transfer=replace(
                tmu_config.transfer,
                teachers=(address,),
                start=replace(tmu_config.transfer.start, teacher=0, unmatched="random"),
            ),
        )
        return load_model(launch(config).run).model.state_dict()

    expected = weights_after("local", tmu_config.transfer.teachers[0])
    assert not (tmp_path / "node").exists(), "what is on a disk is read there"
    for name in ("first", "second"):
        found = weights_after(name, f"{server.url}/teacher")
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert server.gets[WEIGHTS] == 1

    archive = Path(tmu_config.data.url)
    for file in archive.rglob("*.*"):
        write_bytes("memory://ranges", str(file.relative_to(archive)), file.read_bytes())
    by_ranges = {"url": "memory://ranges", "reading": "range", "cache_folder": None}
    for name in ("third", "fourth"):
        found = weights_after(name, f"{server.url}/teacher", **by_ranges)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert server.gets[WEIGHTS] == 1 + 2 * 2, "no copies are wanted: beside it and as its start"


def test_damage_is_found_in_the_store_and_in_the_copy(
    server: ObjectServer, cache: NodeCache, teacher_runs: tuple[str, str]
) -> None:
    url = f"{server.url}/teacher"
    whole = server.objects[WEIGHTS]
    sha256 = load_card(url).weights_sha256
    server.objects[WEIGHTS] = bytes([whole[0] ^ 1]) + whole[1:]
    with pytest.raises(TeacherError, match=rf"{WEIGHTS} is damaged .*card says {sha256[:12]}"):
        load_weights(url, cache=cache)
    assert not list(cache.folder.iterdir()), "no damaged copy is kept"

    server.objects[WEIGHTS] = whole
    expected = sum_of_weights(teacher_runs[0], cache)
    assert sum_of_weights(url, cache) == expected
    (copy,) = cache.folder.iterdir()
    copy.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    server.gets.clear()
    assert sum_of_weights(url, cache) == expected and server.gets[WEIGHTS] == 1
    assert not copy.exists()

    del server.objects[WEIGHTS]
    with pytest.raises(TeacherError, match=r"holds no weights.safetensors"):
        load_weights(url, cache=cache)


def test_where_no_copy_can_be_kept_weights_are_read_all_the_same(
    server: ObjectServer,
    tmp_path: Path,
    teacher_runs: tuple[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    for cache, why in (
        (NodeCache(tmp_path / "small", 10), "may hold"),
        (NodeCache(tmp_path / "file" / "folder", 2**20), "set data.cache_folder"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = sum_of_weights(f"{server.url}/teacher", cache)
        assert found == sum_of_weights(teacher_runs[0], cache)
        assert "is not kept on this node" in caplog.text and why in caplog.text
    assert server.gets[WEIGHTS] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
