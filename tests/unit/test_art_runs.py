"""Runs of attentive transfer: they continue, and their folders hold all that a forecast needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.test_training import assert_same, final_state, run, run_until
from tests.unit.test_transfer import INPUTS, batch
from tmu_dist import evaluate, predict
from tmu_dist.config import AdapterConfig, ARTConfig, RunConfig, StartConfig, TransferConfig
from tmu_dist.run_folder import read_log
from tmu_dist.teachers.card import TeacherCard
from tmu_dist.teachers.store import load_card, load_model, load_weights, write_model


@pytest.fixture
def art_config(tiny_config: RunConfig, teacher_runs: tuple[str, str]) -> RunConfig:
    """With settings that only its card can tell: without them it predicts otherwise."""
    transfer = TransferConfig(
        method="art",
        teachers=teacher_runs,
        adapter=AdapterConfig(layers=(1, 0)),
        art=ARTConfig(window=2),
    )
    training = replace(tiny_config.training, num_steps=4)
    return replace(tiny_config, transfer=transfer, training=training)


def test_a_run_keeps_its_sources_and_its_folder_is_enough(
    art_config: RunConfig, teacher_runs: tuple[str, str], tmp_path: Path, archive_url: str
) -> None:
    straight = run(replace(art_config, output=art_config.output + "-straight"))
    run_until(art_config, 3)
    result = run(art_config)
    assert_same(final_state(result.run), final_state(straight.run))

    weights = load_weights(result.run)[1]
    for m, source in enumerate(teacher_runs):
        theirs = load_weights(source)[1]
        prefix = f"sources.{m}.network."
        assert_same({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)},
                    theirs)  # fmt: skip
    card = load_card(result.run)
    assert [each.weights_sha256 for each in card.sources] == [
        load_card(source).weights_sha256 for source in teacher_runs
    ]
    alive = [event for event in read_log(Path(result.run)) if event["event"] == "liveness"]
    assert alive and all(len(event["merge_means"]) == 2 for event in alive)

    evaluated = evaluate.evaluate_model(result.run, archive_url, split="val")
    assert evaluated.overall["model"]["mse_per_frame"] == pytest.approx(
        result.best_mse_per_frame, rel=1e-6
    )
    assert evaluated.parameters.train == evaluated.parameters.test
    predict.run(result.run, data=archive_url, samples=(1,), split="val", out=str(tmp_path),
                num_frames=5, arrays=True, device="cpu")  # fmt: skip
    loaded = load_model(result.run)
    with np.load(tmp_path / "val-000001.npz") as arrays:
        inputs = torch.from_numpy(arrays["inputs_TCHW"]).unsqueeze(0)
        forecast = loaded.model.predict(inputs, 2).squeeze(0)
        torch.testing.assert_close(
            torch.from_numpy(arrays["prediction_TCHW"]), forecast, rtol=0, atol=1e-6
        )
    write_model(tmp_path / "copy", loaded.model, loaded.card)
    copy = load_model(str(tmp_path / "copy"))
    assert torch.equal(copy.model.predict(inputs, 4), loaded.model.predict(inputs, 4))


def test_an_attentive_network_is_itself_a_source(art_config: RunConfig) -> None:
    training = replace(art_config.training, num_steps=2)
    first = run(replace(art_config, training=training, output=art_config.output + "-first"))
    transfer = TransferConfig(
        method="art",
        teachers=(art_config.transfer.teachers[0], first.run),
        art=ARTConfig(states="hidden", sources="sequential"),
        start=StartConfig(teacher=0),
    )
    second = run(replace(art_config, training=training, transfer=transfer))
    loaded = load_model(second.run)
    inner = load_model(first.run)
    assert loaded.card.sources[1] == inner.card and len(inner.card.sources) == 2
    assert_same(dict(loaded.model.sources[1].network.state_dict()), dict(inner.model.state_dict()))  # type: ignore[union-attr, index]
    assert loaded.model.predict(batch().frames_BTCHW[:, :INPUTS], 3).isfinite().all()


def test_cards_without_sources_still_read(teacher_runs: tuple[str, str]) -> None:
    card = load_card(teacher_runs[0])
    tree = json.loads(card.to_json())
    for name in ("sources", "art", "adapter"):
        del tree[name]
    assert TeacherCard.from_json(json.dumps(tree), where="old") == card
