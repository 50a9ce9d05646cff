"""Question: does an extension of memory transfer do better than the paper's form of it?

    python benchmarks/extensions.py [--only beta weights ...] [--seeds 0 1 2] [--launcher local]

Each extension is a setting; each is tried beside the default with the same seeds, data and teachers
(recipes digits-tmu and digits-predrnn-tmu, shortened). Scores are of the test split. Missing pixels
are made: half of the frames lack a half of their pixels (`occlude`). Writes results.json
and table.md to docs/results/extensions. Runs are resumable: the same command continues.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.writers.objects import write_manifest
from data_prep.writers.webdataset import Sample, shard_path, write_shard
from tmu_dist.config import LaunchConfig, RunConfig, with_overrides
from tmu_dist.data.archive import open_archive
from tmu_dist.data.storage import exists
from tmu_dist.draws import keyed_uniform
from tmu_dist.evaluation.result import MODEL, EvaluationResult
from tmu_dist.ledger.records import EVALUATION_FOLDER
from tmu_dist.ledger.runs import evaluate_run, is_done, train_teachers
from tmu_dist.ledger.statistics import Measurement, gain, measure_mean
from tmu_dist.ledger.words import BETTER, spread
from tmu_dist.provenance import git_revision
from tmu_dist.recipes import get_recipe
from tmu_dist.recipes.base import Recipe
from tmu_dist.training.launch import with_absolute_paths
from tmu_dist.training.many import Job, run_many
from tmu_dist.workspace import in_workspace

NUM_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Extension:
    """One question: variants of one setting; the first is the paper's form."""

    question: str
    recipe: str = "digits-tmu"
    variants: Mapping[str, Mapping[str, Any]]
    occluded: bool = False
    """Learn from frames with missing pixels."""


def _schedule(shape: str, stop: int, final: float) -> dict[str, Any]:
    return {
        "transfer.beta_schedule.shape": shape,
        "transfer.beta_schedule.stop": stop,
        "transfer.beta_schedule.final": final,
    }


EXTENSIONS = {
    "beta": Extension(
        question="Should the weight of the distillation change during training?",
        variants={
            "constant 0.1": {},
            "linear, 0.1 to 0": _schedule("linear", NUM_STEPS, 0.0),
            "cosine, 0.1 to 0": _schedule("cosine", NUM_STEPS, 0.0),
            "linear, 0 to 0.1 in half": {
                "transfer.beta": 0.0,
                **_schedule("linear", NUM_STEPS // 2, 0.1),
            },
        },
    ),
    "weights": Extension(
        question="Should the teacher of two digits count more than that of one?",
        variants={
            "1, 1": {},
            "0.25, 1.75": {"transfer.imitation.teacher_weights": (0.25, 1.75)},
            "1.75, 0.25": {"transfer.imitation.teacher_weights": (1.75, 0.25)},
        },
    ),
    "layers": Extension(
        question="Which layers should imitate?",
        variants={
            "both": {},
            "lower": {"transfer.imitation.layers": (0,)},
            "upper": {"transfer.imitation.layers": (1,)},
        },
    ),
    "masking": Extension(
        question="How should a memory count where pixels are missing?",
        occluded=True,
        variants={
            "patch": {},
            "memory": {"transfer.imitation.masking": "memory"},
            "off": {"transfer.imitation.masking": "off"},
        },
    ),
    "zigzag": Extension(
        question="Should PredRNN's second memory be transferred, too?",
        recipe="digits-predrnn-tmu",
        variants={"C": {}, "C and M": {"transfer.tmu.zigzag": True}},
    ),
}


METRICS = {"mse_per_frame": ("MSE/frame", 1), "ssim": ("SSIM", 3)}
"""Heading and decimals."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", choices=tuple(EXTENSIONS), default=list(EXTENSIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--launcher", choices=("ray", "local"), default="local")
    parser.add_argument("--parallel", type=int)
    parser.add_argument("--out", type=Path, default=Path("docs/results/extensions"))
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    launch = LaunchConfig(launcher=chosen.launcher)
    configs: dict[tuple[str, str, int], RunConfig] = {}
    for name in chosen.only:
        recipe = _recipe(EXTENSIONS[name], launch)
        train_teachers([recipe], chosen.parallel)
        configs |= _configs(name, recipe.config, chosen.seeds)
    missing = {c.output: c for c in configs.values() if not is_done(Path(c.output))}
    jobs = [Job(config=config, then=evaluate_run) for config in missing.values()]
    run_many(jobs, launch, chosen.parallel)
    record = {
        "num_steps": NUM_STEPS,
        "seeds": chosen.seeds,
        "git_revision": git_revision(),
        "extensions": {name: _measure(name, configs, chosen.seeds) for name in chosen.only},
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    (chosen.out / "table.md").write_text(table(record))


def _recipe(extension: Extension, launch: LaunchConfig) -> Recipe:
    """The recipe, shortened; on an archive with missing pixels if that is the question."""
    recipe = get_recipe(extension.recipe)
    changes: dict[str, Any] = {
        "training.num_steps": NUM_STEPS,
        "training.sampling_stop_step": NUM_STEPS // 2,
    }
    if extension.occluded:
        train_teachers([recipe], None)
        url = in_workspace("archives/digits-3-occluded")
        occlude(recipe.config.data.url, url)
        changes |= {"data.url": url, "transfer.adapter.units": "any"}
    config = with_overrides(recipe.config, changes)
    return replace(recipe, config=replace(config, launch=launch))


def _configs(
    name: str, config: RunConfig, seeds: Sequence[int]
) -> dict[tuple[str, str, int], RunConfig]:
    """By extension, variant and seed; extensions share the runs of a default that they share."""
    extension = EXTENSIONS[name]
    default = extension.recipe + ("-occluded" if extension.occluded else "")
    found = {}
    for number, (variant, changes) in enumerate(extension.variants.items()):
        run = f"{name}-{number}" if changes else default
        for seed in seeds:
            output = in_workspace(f"runs/extensions/{run}-seed{seed}")
            changed = with_overrides(config, {**changes, "training.seed": seed, "output": output})
            found[name, variant, seed] = with_absolute_paths(changed)
    return found


def _measure(
    name: str, configs: Mapping[tuple[str, str, int], RunConfig], seeds: Sequence[int]
) -> dict[str, Any]:
    """Scores of every variant by seed, and its gain over the first one with an interval."""
    found: dict[str, Any] = {}
    defaults: dict[str, Measurement] = {}
    for variant in EXTENSIONS[name].variants:
        results = {
            seed: EvaluationResult.load(
                Path(configs[name, variant, seed].output, EVALUATION_FOLDER)
            )
            for seed in seeds
        }
        found[variant] = {}
        for metric in METRICS:
            scores = {
                seed: result.per_sequence[MODEL].per_sequence(metric)
                for seed, result in results.items()
                if result.per_sequence is not None
            }
            measured = measure_mean(scores)
            over = gain(
                measured,
                defaults.setdefault(metric, measured),
                higher_is_better=metric == "ssim",
            )
            assert over is not None
            found[variant][metric] = {
                "by_seed": measured.score_S.tolist(),
                "gain": asdict(over) | {"flag": over.flag},
            }
    return found


def table(record: Mapping[str, Any]) -> str:
    """Markdown: a block for each question."""
    headings = " | ".join(heading for heading, _ in METRICS.values())
    lines = [
        f"| setting | {headings} | gain in MSE/frame (95 %) | by seed |",
        "|---" * (len(METRICS) + 3) + "|",
    ]
    for name, variants in record["extensions"].items():
        lines.append(f"| **{EXTENSIONS[name].question}** |" + " |" * (len(METRICS) + 2))
        lines += list(_rows(variants))
    return "\n".join(lines) + "\n"


def _rows(variants: Mapping[str, Any]) -> Iterator[str]:
    for number, (variant, scores) in enumerate(variants.items()):
        cells = [
            spread(scores[metric]["by_seed"], decimals) for metric, (_, decimals) in METRICS.items()
        ]
        over = scores["mse_per_frame"]["gain"]
        ends = f"{over['low']:+.2f} to {over['high']:+.2f}"
        gained = f"{over['mean']:+.2f} ({ends}, {BETTER[over['flag']]})"
        by_seed = ", ".join(f"{value:+.2f}" for value in over["by_seed"])
        cells += [gained, by_seed] if number else ["", ""]
        yield f"| {variant} | {' | '.join(cells)} |"


def occlude(url: str, out_url: str) -> None:
    """Copy an archive of grey sequences with missing pixels, unless it is there.

    In half of the frames one half of the pixels is missing. Of the validation and test splits only
    the input frames, so that forecasts are scored on all pixels.
    """
    if exists(out_url, "manifest.json"):
        return
    archive = open_archive(url)
    manifest = archive.manifest
    num_input_frames = get_recipe("digits-tmu").config.window.num_input_frames
    splits = {}
    for number, split in enumerate(manifest.splits):
        last = manifest.num_frames if split == "train" else num_input_frames
        codes_NTCHW = archive.read(split, range(manifest.num_samples(split)))
        samples = [
            Sample(
                f"{split}-{sample:08d}",
                _without_halves(codes_TCHW, number, sample, last),
                {"sample_id": sample},
            )
            for sample, codes_TCHW in enumerate(codes_NTCHW)
        ]
        splits[split] = (write_shard(out_url, shard_path(split, 0), samples),)
    units = replace(manifest.units, scale=1 / 254, max_code=254, missing_code=255)
    write_manifest(
        out_url,
        replace(
            manifest,
            name=f"{manifest.name}-occluded",
            units=units,
            splits=splits,
            created_by={"occluded": url},
        ),
    )


def _without_halves(
    codes_TCHW: NDArray[np.generic], split: int, sample: int, last: int
) -> NDArray[np.uint8]:
    """Codes 0 to 254, and 255 in a half of every other frame before the last one."""
    found_TCHW = (codes_TCHW.astype(np.uint16) * 254 // 255).astype(np.uint8)
    height, width = found_TCHW.shape[2:]
    halves = (
        (slice(height // 2), slice(None)),
        (slice(height // 2, None), slice(None)),
        (slice(None), slice(width // 2)),
        (slice(None), slice(width // 2, None)),
    )
    for t in range(last):
        which, missing = keyed_uniform(np.array([2 * t, 2 * t + 1]), split, sample)
        if missing < 0.5:
            rows, columns = halves[int(which * 4)]
            found_TCHW[t, :, rows, columns] = 255
    return found_TCHW


if __name__ == "__main__":
    main()
