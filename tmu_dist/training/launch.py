"""Where the processes of a run come from: this process, torchrun, or Ray Train.

All three end in the same `loop.train`, with the same numbers.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from tmu_dist.collectives import Collectives, Ranks
from tmu_dist.config import ConfigError, RunConfig
from tmu_dist.training.loop import RunResult, train
from tmu_dist.training.progress import ProgressDisplay


def launch(config: RunConfig) -> RunResult:
    """Run to the end, wherever `launch.launcher` says; returns when all ranks are done.

    Raises:
        Everything that `loop.train` raises, in the calling process.
    """
    config = _with_absolute_paths(config)
    if config.launch.launcher == "ray":
        from tmu_dist.training.ray_worker import train_on_ray

        return train_on_ray(config)
    if config.launch.launcher == "torchrun":
        return _train_under_torchrun(config)
    device = pick_device(config.launch.device, local_rank=0)
    return _train_shown(config, Collectives(), device)


def pick_device(wanted: str, *, local_rank: int) -> torch.device:
    """The device of a rank.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"launch.device={wanted}, but torch {torch.__version__} sees no CUDA device here. "
            "Use launch.device=auto or cpu, or install a CUDA build of torch."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def process_group_backend(on_gpu: bool) -> str:
    """NCCL for GPU tensors, gloo for everything on the CPU."""
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


def _train_under_torchrun(config: RunConfig) -> RunResult:
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"launch.launcher=torchrun, but {', '.join(missing)} not set: start with "
            "`torchrun --nproc-per-node N -m tmu_dist.train --launcher torchrun ...`."
        )
    ranks = Ranks(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
    )
    device = pick_device(config.launch.device, local_rank=ranks.local_rank)
    dist.init_process_group(process_group_backend(device.type == "cuda"))
    try:
        return _train_shown(config, Collectives(ranks), device)
    finally:
        dist.destroy_process_group()


def _train_shown(config: RunConfig, collectives: Collectives, device: torch.device) -> RunResult:
    display = ProgressDisplay(Path(config.output).name, config.training.num_steps)
    try:
        return train(config, collectives, device, listener=display)
    finally:
        display.close()


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Workers start in other folders, so local paths are resolved once, here."""

    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().absolute())

    if "://" in config.output:
        raise ConfigError(
            f"output={config.output!r}: a run folder must be a path on a disk that all workers see."
        )
    return replace(
        config,
        output=absolute(config.output),
        data=replace(config.data, url=absolute(config.data.url)),
        transfer=replace(
            config.transfer, teachers=tuple(absolute(t) for t in config.transfer.teachers)
        ),
    )
