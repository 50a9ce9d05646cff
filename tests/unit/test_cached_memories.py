"""Memories from files: they are what the teachers tell, bit for bit, or an error that says why not.

Legend: B batch, T time, C channels, H, W height, width.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.moving_mnist import MovingMNISTConfig, write_moving_mnist
from tests.conftest import TINY_MODEL
from tests.s3_servers import localbucket
from tests.transfer_methods import case_of
from tmu_dist import memories
from tmu_dist.collectives import Collectives
from tmu_dist.config import (
    AdapterConfig,
    ModelConfig,
    PlacementConfig,
    RunConfig,
    TMUConfig,
    TransferConfig,
)
from tmu_dist.data import storage
from tmu_dist.data.transforms import window_frames
from tmu_dist.memories import make, price, show_price, verify, work_of
from tmu_dist.models.build import skeleton
from tmu_dist.teachers.adapter import StudentFacts
from tmu_dist.teachers.bank import FrozenTeacher, SampleKey, Shown, Teaching
from tmu_dist.teachers.card import TeacherError
from tmu_dist.teachers.memories.bank import CachedBank, Lesson
from tmu_dist.teachers.memories.files import MemoriesError, RecordLayout
from tmu_dist.teachers.memories.making import Part
from tmu_dist.teachers.memories.price import Price, TeacherPrice
from tmu_dist.teachers.planned import plan_use
from tmu_dist.teachers.store import load_model
from tmu_dist.training.launch import launch
from tmu_dist.training.loop import Run
from tmu_dist.transfer.base import TaughtMethod, TrainingBatch

CPU = torch.device("cpu")
NUMBERS = 5 * 4 * 4 * 4
"""Of a tiny teacher's memory in one layer: steps, channels, and maps of 16 / 4 pixels."""
RECORD_BYTES = 2 * NUMBERS * 4 + 4
SHARD_BYTES = 5 * RECORD_BYTES + 100
"""Five records, so that 22 samples leave an uneven last shard."""


@pytest.fixture
def cached(tmu_config: RunConfig, tmp_path: Path) -> RunConfig:
    """`tmu_config`, forwards in time, with memories from files that are not made yet."""
    config = with_training(tmu_config, reverse_input="off")
    return with_cache(config, str(tmp_path / "cache"))


def with_cache(config: RunConfig, cache: str) -> RunConfig:
    return replace(
        config,
        transfer=replace(config.transfer, teacher_input="truth"),
        placement=PlacementConfig(kind="cached", cache=cache),
    )


def replicated(config: RunConfig) -> RunConfig:
    """The same run with teachers that run."""
    placement = replace(config.placement, kind="replicated", cache=None)
    return replace(config, output=f"{config.output}-replicated", placement=placement)


def with_training(config: RunConfig, **settings: Any) -> RunConfig:
    return replace(config, training=replace(config.training, **settings))


def batches(run: Run, count: int) -> Iterator[TrainingBatch]:
    """The first batches of a run, whose students read their own predictions now and then."""
    for batch in islice(run.loader.stream(0), count):
        frames_BTCHW, _ = window_frames(batch.frames_BTCHW, run.config.window, run.units)
        yield TrainingBatch(
            frames_BTCHW=frames_BTCHW,
            observed_BTCHW=None,
            sampling_mask_BT=batch.sample_ids_B[:, None] % 3 == torch.arange(2),
            weights_B=batch.weights_B / batch.global_count,
            sample_ids_B=batch.sample_ids_B,
            step=1,
        )


def gradients(run: Run, batch: TrainingBatch) -> list[torch.Tensor]:
    run.trainee.zero_grad()
    run.training_step.backward(batch, 1.0)
    return [p.grad.clone() for p in run.trainee.parameters() if p.grad is not None]


def assert_same_gradients(config: RunConfig, steps: int = 2) -> None:
    """Of the first batches of a run, forwards and backwards if it learns both."""
    one, other = (Run(c, Collectives(), CPU) for c in (config, replicated(config)))
    for forwards in batches(one, steps):
        for given in (forwards, forwards.backwards()):
            pairs = list(zip(gradients(one, given), gradients(other, given), strict=True))
            assert pairs and all(torch.equal(a, b) for a, b in pairs)
            if config.training.reverse_input == "off":
                break


def files(folder: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def records_bytes(folder: Path) -> int:
    found = files(str(folder / "cache"))
    return sum(len(data) for name, data in found.items() if name.endswith("records.bin"))


class CountedTeachers:
    """How many sequences teachers have seen; four at a time, filled up by repeats."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sequences = 0
        forward = FrozenTeacher.forward

        def counted(teacher: FrozenTeacher, frames: torch.Tensor, **how: Any) -> Teaching:
            self.sequences += len(frames)
            return forward(teacher, frames, **how)

        monkeypatch.setattr(FrozenTeacher, "forward", counted)


@pytest.mark.parametrize("case", ["tmu", "distillation", "knowledge_flow-all", "tmu-shuffled"])
def test_gradients_are_those_of_replicated_teachers(
    case: str, tiny_config: RunConfig, teacher_runs: tuple[str, str], tmp_path: Path
) -> None:
    config = with_cache(case_of(tiny_config, case, teacher_runs), str(tmp_path / "cache"))
    make(work_of(config), shard_bytes=SHARD_BYTES)
    assert_same_gradients(config, steps=7 if case == "tmu" else 2)  # six are an epoch


@pytest.mark.parametrize("memories_precision", ["bf16", "fp16"])
def test_rounded_memories_are_those_that_others_tell(
    memories_precision: Any, cached: RunConfig, tmp_path: Path
) -> None:
    placement = replace(cached.placement, memories=memories_precision)
    config = replace(cached, placement=placement)
    make(work_of(config))
    assert_same_gradients(config)
    assert records_bytes(tmp_path) == 2 * 22 * (2 * NUMBERS * 2 + 4)


def test_both_directions_and_bf16_arithmetic(cached: RunConfig) -> None:
    config = with_training(cached, reverse_input="update", precision="bf16")
    make(work_of(config))
    assert_same_gradients(config)


def test_teachers_unlike_the_student(
    tiny_config: RunConfig, tmp_path: Path, archive_url: str
) -> None:
    """ST-LSTM's M, and a teacher that reads larger frames and has other channels."""
    model = replace(TINY_MODEL, cell="predrnn", hidden_channels=3)
    teacher = replace(
        tiny_config,
        output=str(tmp_path / "predrnn"),
        model=model,
        training=replace(tiny_config.training, num_steps=1),
    )
    transfer = TransferConfig(
        method="tmu", teachers=(launch(teacher).run,), tmu=TMUConfig(zigzag=True)
    )
    adapter = replace(transfer.adapter, channels="project")
    config = replace(
        tiny_config,
        model=replace(model, hidden_channels=4),
        transfer=replace(transfer, adapter=adapter),
    )
    config = with_cache(config, str(tmp_path / "cache"))
    make(work_of(config))
    assert_same_gradients(config)


def test_mixed_archives_and_fractions(cached: RunConfig, tmp_path: Path) -> None:
    """Ids count on from archive to archive; a fraction keeps only its own samples."""
    other = str(tmp_path / "other")
    settings = MovingMNISTConfig(
        digits=1,
        train=9,
        val=2,
        test=2,
        frames=6,
        frame_size=16,
        digit_size=7,
        speed=(1.0, 2.0),
        samples_per_shard=4,
        seed=3,
    )
    write_moving_mnist(settings, other, workers=1, show_progress=False)
    data = replace(cached.data, mix_with=(other,), mix_weights=(1.0, 2.0), fraction=0.5)
    config = replace(cached, data=data)
    make(work_of(config), shard_bytes=SHARD_BYTES)
    assert_same_gradients(config, steps=8)
    counts = sorted(json.loads(data)["num_records"] for data in index_files(config))
    assert counts == [9, 9, 11, 11]  # of each archive, by two teachers; half of 22
    with pytest.raises(MemoriesError, match="num_samples is 11 there and 22 here"):
        Run(replace(config, data=replace(data, fraction=1.0)), Collectives(), CPU)


def index_files(config: RunConfig) -> list[bytes]:
    assert config.placement.cache is not None
    found = files(config.placement.cache)
    return [data for name, data in found.items() if name.endswith("index.json")]


def test_shards_are_documented_bytes(cached: RunConfig, teacher_runs: tuple[str, str]) -> None:
    """The last shard is shorter; a record is what docs/cached_memories.md says, read by numpy."""
    make(work_of(cached), shard_bytes=SHARD_BYTES)
    work = work_of(cached)
    part = Part(teacher=1, archive=0, is_backwards=False)
    folder = Path(work.folder(part).url)
    index = json.loads((folder / "index.json").read_text())
    assert [shard["num_records"] for shard in index["shards"]] == [5, 5, 5, 5, 2]
    loaded = load_model(teacher_runs[1])
    run = Run(replicated(cached), Collectives(), CPU)
    (batch,) = batches(run, 1)
    rollout = loaded.model(
        batch.frames_BTCHW,
        num_input_frames=3,
        num_frames=6,
        sampling_mask_BT=torch.ones(4, 2, dtype=torch.bool),
    )
    assert batch.sample_ids_B is not None
    for row, sample_id in enumerate(batch.sample_ids_B.tolist()):
        data = (folder / f"{sample_id // 5:05d}" / "records.bin").read_bytes()
        numbers = np.frombuffer(data, "<f4", 2 * NUMBERS, sample_id % 5 * RECORD_BYTES)
        for layer, memory in enumerate(rollout.memories):
            of_layer = numbers[layer * NUMBERS : (layer + 1) * NUMBERS]
            assert np.array_equal(of_layer, memory[row].detach().numpy().ravel())


def test_a_whole_run_is_that_of_replicated_teachers(
    cached: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_training(cached, reverse_input="average")
    make(work_of(config))
    expected = launch(replicated(config)).run
    teachers = CountedTeachers(monkeypatch)
    run = launch(config).run
    assert teachers.sequences == 0
    one, other = (load_model(each).model.state_dict() for each in (run, expected))
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [losses(each) for each in (run, expected)]
    assert logs[0] == logs[1] and len(logs[0]) == config.training.num_steps


def losses(run: str) -> list[dict[str, float]]:
    lines = map(json.loads, Path(run, "log.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in line.items() if name.startswith("loss/")}
        for line in lines
        if line["event"] == "train"
    ]


def test_no_weights_are_in_memory(cached: RunConfig) -> None:
    make(work_of(cached))
    run, other = (Run(c, Collectives(), CPU) for c in (cached, replicated(cached)))
    assert isinstance(run.transfer.method, TaughtMethod)
    bank = run.transfer.method.bank
    assert isinstance(bank, CachedBank)
    assert run.transfer.resident_parameters == other.transfer.resident_parameters
    assert not any(isinstance(value, torch.nn.Module) for value in vars(bank).values())


# What is missing, damaged or another's


def test_a_store_holds_the_same(
    cached: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(work_of(cached), shard_bytes=SHARD_BYTES)
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    url = "s3://bucket/cache"
    config = with_cache(cached, url)
    with localbucket(tmp_path / "buckets") as server:
        server.use(monkeypatch)
        make(work_of(config), shard_bytes=SHARD_BYTES)
        here = files(str(tmp_path / "cache"))
        assert {path: storage.read_bytes(url, path) for path in storage.list_paths(url)} == here
        assert_same_gradients(config)
        assert price(work_of(config), num_epochs=1.0).free_bytes is None
        storage.delete(url, next(path for path in here if path.endswith("00003/records.bin")))
        with pytest.raises(MemoriesError, match=r"lacks 1 of its 5 shards.*00003"):
            Run(config, Collectives(), CPU)
        make(work_of(config))
        verify(work_of(config))
        assert {path: storage.read_bytes(url, path) for path in storage.list_paths(url)} == here


def test_killed_making_goes_on_where_it_stopped(
    cached: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process that is killed between two shards leaves whole ones, which are kept."""
    script = f"""
import os, signal
from tests.unit.test_cached_memories import SHARD_BYTES
from tmu_dist.config.run import from_dict
from tmu_dist.memories import make, work_of
from tmu_dist.teachers.memories.making import Part
from tmu_dist.teachers.memories.files import MemoryFolder
write_folder, written = MemoryFolder.write_shard, []
def write(folder, number, records):
    if len(written) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    write_folder(folder, number, records)
    written.append(number)
MemoryFolder.write_shard = write
make(work_of(from_dict({tree_of(cached)!r})), shard_bytes=SHARD_BYTES)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(MemoriesError, match="unfinished, 3 of 5 shards are not there"):
        Run(cached, Collectives(), CPU)
    before = files(str(tmp_path / "cache"))
    teachers = CountedTeachers(monkeypatch)
    make(work_of(cached), shard_bytes=10 * SHARD_BYTES)  # of what has begun, shards keep their size
    # The first teacher's five shards and two of the second's are there: 5, 5 and 2 are left.
    assert teachers.sequences == 8 + 8 + 4
    after = files(str(tmp_path / "cache"))
    assert before == {name: after[name] for name in before}
    make(work_of(cached))
    assert teachers.sequences == 8 + 8 + 4
    verify(work_of(cached))


def tree_of(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))


def test_half_written_shards_are_swept(cached: RunConfig, tmp_path: Path) -> None:
    make(work_of(cached))
    folder = Path(work_of(cached).folder(Part(0, 0, False)).url)
    (folder / "00000" / "records.bin").unlink()
    left, others = (folder / f".0000{number}.writing-1-0a" for number in range(2))
    left.mkdir()
    others.mkdir()  # perhaps being written by another process
    with pytest.raises(MemoriesError, match=r"lacks 1 of its 1 shards.*make"):
        Run(cached, Collectives(), CPU)
    make(work_of(cached))
    assert not left.exists() and others.exists()
    assert_same_gradients(cached)


def test_parts_make_one_cache(
    cached: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = with_cache(cached, str(tmp_path / "whole"))
    make(work_of(whole), shard_bytes=SHARD_BYTES)
    teachers = CountedTeachers(monkeypatch)
    make(work_of(cached), part=(1, 2), shard_bytes=SHARD_BYTES)
    assert teachers.sequences == 2 * (8 + 8 + 1)  # shards 1 and 3, and a look at a first sample
    with pytest.raises(MemoriesError, match="unfinished, 3 of 5"):
        Run(cached, Collectives(), CPU)
    make(work_of(cached), part=(0, 2), shard_bytes=SHARD_BYTES)
    assert teachers.sequences == 2 * (8 + 8 + 1 + 8 + 8 + 4)
    assert files(str(tmp_path / "cache")) == files(str(tmp_path / "whole"))


def test_damage_is_named(cached: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    make(work_of(cached), shard_bytes=SHARD_BYTES)
    work = work_of(cached)
    folder = Path(work.folder(Part(1, 0, False)).url)
    file = folder / "00002" / "records.bin"
    data = bytearray(file.read_bytes())
    record = len(data) // 5
    data[3 * record + 100] ^= 1  # of sample 13
    file.write_bytes(data)
    named = rf"{folder}/00002/records.bin is damaged: the record of sample 13 .*Remove.*make"
    with pytest.raises(MemoriesError, match=named):
        verify(work)
    bank = Run(cached, Collectives(), CPU).transfer.method.bank  # type: ignore[attr-defined]
    assert len(teach(bank, [12, 14])) == 2
    with pytest.raises(MemoriesError, match=named):
        teach(bank, [12, 13])
    # Two records that change places are whole, and wrong.
    file.write_bytes(data[record : 2 * record] + data[:record] + data[2 * record :])
    with pytest.raises(MemoriesError, match="sample 10"):
        teach(bank, [10])
    for path in (file, file.with_name("shard.json")):
        path.unlink()
    file.parent.rmdir()
    teachers = CountedTeachers(monkeypatch)
    make(work)
    assert teachers.sequences == 8
    verify(work_of(cached))


def teach(bank: CachedBank, ids: Sequence[int], **changes: Any) -> tuple[Teaching, ...]:
    how: dict[str, Any] = {
        "num_input_frames": 3,
        "num_frames": 6,
        "sampling_mask_BT": torch.ones(len(ids), 2, dtype=torch.bool),
        "key": SampleKey(torch.tensor(ids)),
    }
    return bank.teach(Shown(torch.zeros(len(ids), 6, 1, 16, 16), **(how | changes)))


def test_records_that_are_not_the_teachers_are_found(cached: RunConfig) -> None:
    """Whole files of another teacher under this one's name: only computing again shows it."""
    make(work_of(cached))
    work = work_of(cached)
    first, second = (Path(work.folder(Part(m, 0, False)).url) for m in (0, 1))
    for name in ("00000/records.bin", "00000/shard.json", "index.json"):
        (first / name).write_bytes((second / name).read_bytes())
    with pytest.raises(MemoriesError, match=r"memory of sample \d+ is not what teacher-1 tells"):
        verify(work)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training": {"precision": "bf16"}}, 'precision is "fp32" there and "bf16" here'),
        ({"training": {"reverse_input": "update"}}, "is_backwards is false there and true here"),
        ({"placement": {"memories": "bf16"}}, 'memories is "full" there and "bf16" here'),
        ({"window": {"num_target_frames": 2}}, "window is .* there and .* here"),
        ({"transfer": {"tmu": TMUConfig(layers=(1,))}}, "layers is "),
    ],
)
def test_other_memories_are_refused(
    changes: dict[str, dict[str, Any]], named: str, cached: RunConfig
) -> None:
    make(work_of(cached))
    sections = {name: replace(getattr(cached, name), **more) for name, more in changes.items()}
    with pytest.raises(MemoriesError, match=named) as refused:
        Run(replace(cached, **sections), Collectives(), CPU)
    assert "python -m tmu_dist.memories make" in str(refused.value)


def test_other_teachers_and_missing_caches_are_named(
    cached: RunConfig, teacher_runs: tuple[str, str], tmp_path: Path
) -> None:
    nothing = rf"{tmp_path}/cache holds no memories of teacher teacher-1.*none at all.*make"
    with pytest.raises(MemoriesError, match=nothing):
        Run(cached, Collectives(), CPU)
    alone = replace(cached.transfer, teachers=teacher_runs[:1])
    make(work_of(replace(cached, transfer=alone)))
    with pytest.raises(MemoriesError, match="of teacher teacher-2.*teacher_weights is "):
        Run(cached, Collectives(), CPU)


def test_what_cannot_be_kept_is_refused(cached: RunConfig) -> None:
    """Teachers that draw, numbers that a precision has not, batches without names."""
    work = work_of(cached)
    teacher = work.lessons[0].teacher
    card = replace(teacher.card, model=ModelConfig(cell="savp"), tmu=TMUConfig())
    memories = skeleton(card.frame, card.model).memory_shapes
    twin = StudentFacts(frame=card.frame, memories=memories, data=card.data)
    draws = plan_use(card, teacher.load_network, teacher.use, twin, AdapterConfig())
    with pytest.raises(TeacherError, match="draws latents"):
        Lesson(teacher=draws, window=cached.window, precision="fp32")
    large = Teaching({"memory": {0: torch.full((1, 1, 1, 2, 2), 7e4).half()}})
    with pytest.raises(MemoriesError, match="memory is not finite.*bf16"):
        RecordLayout.of(large).encode(large, [0])
    make(work)
    bank = Run(cached, Collectives(), CPU).transfer.method.bank  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="name them"):
        teach(bank, [1], key=None)
    with pytest.raises(ValueError, match="windows of 6 frames"):
        teach(bank, [1], num_frames=5)


# Price and commands


def test_price_is_what_making_costs(
    cached: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes from the network's shapes; and nothing is left behind."""
    config = with_training(cached, reverse_input="update")
    found = price(work_of(config), num_epochs=1.0)
    assert not list(tmp_path.glob("cache/*"))
    assert [each.record_bytes for each in found.teachers] == [RECORD_BYTES] * 2
    assert found.total_bytes == found.bytes_to_make == 2 * 2 * 22 * RECORD_BYTES
    assert memories.epochs_of(config, work_of(config)) == pytest.approx(7 * 4 / 22)
    assert all(each.run_seconds > 0 and each.read_seconds > 0 for each in found.teachers)
    show_price(found)
    assert found.verdict().split(":")[0] in " ".join(capsys.readouterr().out.split())
    make(work_of(cached))  # forwards only
    later = price(work_of(config), num_epochs=1.0)
    assert later.bytes_to_make == found.total_bytes // 2
    assert records_bytes(tmp_path) == found.total_bytes // 2


@pytest.mark.parametrize(
    ("run", "read", "free", "epochs", "epoch", "said"),
    [
        # Made in 1,000 * (0.5 + 0.1) s, saved 1,000 * (0.5 - 0.2) s an epoch.
        (0.5, 0.2, 10**9, 30.0, 2, "It pays from epoch 2 on"),
        (0.5, 0.2, 10**9, 1.5, 2, "It does not pay in this run: it would from epoch 2"),
        (0.2, 0.2, None, 30.0, None, "It never pays: reading"),
        (0.5, 0.2, 10**6 - 1, 30.0, 2, "It does not fit: 1.0 MiB are needed"),
    ],
)
def test_verdicts(
    run: float, read: float, free: int | None, epochs: float, epoch: int | None, said: str
) -> None:
    teacher = TeacherPrice(
        name="one",
        record_bytes=1000,
        num_records=1000,
        num_made=0,
        run_seconds=run,
        write_seconds=0.1,
        read_seconds=read,
    )
    found = Price(teachers=(teacher,), free_bytes=free, num_epochs=epochs)
    assert found.break_even_epoch == epoch
    assert found.verdict().startswith(said)
    # An independent count: without files every epoch runs the teacher; with them the first makes.
    spent = [(1000 * run * e, 1000 * (run + 0.1) + 1000 * read * e) for e in range(1, 100)]
    paid = next((e for e, (without, with_) in enumerate(spent, 1) if with_ <= without + 1e-6), None)
    assert paid == epoch


def test_commands(
    cached: RunConfig,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memories, "parse_command", lambda flags, **_: _Recipe(cached))
    caplog.set_level("INFO")
    memories.main(["price"])
    assert "teacher-1" in capsys.readouterr().out
    memories.main(["make", "--part", "0/2", "--shard-mib", "0.0125"])
    assert "2 folders of" in caplog.text and "wait for the other parts" in caplog.text
    with pytest.raises(SystemExit):
        memories.main(["verify"])
    assert "unfinished" in capsys.readouterr().err
    memories.main(["make", "--part", "1/2"])
    memories.main(["verify"])
    assert "is whole and what the teachers tell" in caplog.text
    with pytest.raises(SystemExit):
        memories.main(["make", "--part", "2/2"])
    assert "must be K/N" in capsys.readouterr().err
    monkeypatch.setattr(memories, "parse_command", lambda flags, **_: _Recipe(replicated(cached)))
    with pytest.raises(SystemExit):
        memories.main(["make"])
    assert "--placement.kind cached" in capsys.readouterr().err


class _Recipe:
    def __init__(self, config: RunConfig) -> None:
        self.config = config
