"""Where the processes of a run come from: this process, torchrun, or Ray Train.

All three end in the same `loop.train`, with the same numbers. torch and the loop are loaded where a
rank begins: the command that starts Ray's workers is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tmu_dist.collectives import Collectives
from tmu_dist.config import ConfigError, RunConfig
from tmu_dist.data.storage import local_path
from tmu_dist.run_folder import Event, RunResult
from tmu_dist.training.progress import ProgressDisplay
from tmu_dist.training.rank_log import rank_log
from tmu_dist.workspace import located

if TYPE_CHECKING:
    import torch


def launch(config: RunConfig, collectives: Collectives | None = None) -> RunResult:
    """Run to the end, wherever `launch.launcher` says; returns when all ranks are done.

    Args:
        config: the run.
        collectives: from `joined_ranks`; None means this process alone.

    Raises:
        Everything that `loop.train` raises, in the calling process.
    """
    config = with_absolute_paths(config)
    if config.launch.launcher == "ray":
        from tmu_dist.training.ray_cluster import connect_for

        variables = connect_for(config)  # Ray's processes start while the next module is loaded
        from tmu_dist.training.ray_worker import train_on_ray

        return train_on_ray(config, variables)
    if collectives is None and config.launch.launcher == "torchrun":
        raise ConfigError("launch.launcher=torchrun needs the ranks from `joined_ranks`.")
    display = ProgressDisplay(Path(config.output).name, config.training.num_steps)
    try:
        return train_here(config, collectives or Collectives(), listener=display)
    finally:
        display.close()


def train_here(
    config: RunConfig,
    collectives: Collectives,
    listener: Callable[[Event], None] | None = None,
) -> RunResult:
    """This process's part of a run, on its own device; what it says is kept in the run folder.

    Args:
        config: the run, with whole paths.
        collectives: the ranks.
        listener: sees rank 0's log events.

    Raises:
        Everything that `loop.train` raises.
    """
    from tmu_dist.training.loop import train

    device = pick_device(config.launch.device, local_rank=collectives.ranks.local_rank)
    with rank_log(config.output, collectives.ranks):
        return train(config, collectives, device, listener=listener)


def pick_device(wanted: str, *, local_rank: int) -> torch.device:
    """The device of a rank.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    import torch

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


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Workers start in other folders, so local paths are resolved once, here."""
    if config.output.startswith(("http://", "https://", "memory://")):
        raise ConfigError(
            f"output={config.output!r}: a run folder must be on a disk that all workers see, or in "
            "a store that can be written, such as s3://bucket/runs/name."
        )
    cache = config.placement.cache
    return replace(
        config,
        output=absolute(config.output),
        data=replace(
            config.data,
            url=absolute(config.data.url),
            mix_with=tuple(absolute(url) for url in config.data.mix_with),
        ),
        transfer=replace(
            config.transfer, teachers=tuple(absolute(t) for t in config.transfer.teachers)
        ),
        placement=replace(config.placement, cache=cache and absolute(cache)),
    )


def absolute(address: str) -> str:
    """A path from the root of the disk; a URL as it is, without a slash at its end."""
    folder = local_path(address)
    return located(address).rstrip("/") if folder is None else str(folder)
