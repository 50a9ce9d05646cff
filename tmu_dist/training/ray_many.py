"""Many runs on Ray: one task a run, on one CPU or GPU each, as many at once as there is room for.

A task whose worker dies is started again by Ray and continues from the run's checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from tmu_dist.config import LaunchConfig
from tmu_dist.training.many import Job, Outcome, run_job

# Before ray: it sets the variables that Ray reads when it is imported.
from tmu_dist.training.ray_cluster import connect, reach_stores
from tmu_dist.training.ray_places import wants_gpu

import ray  # isort: skip
from ray.exceptions import (  # isort: skip
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    WorkerCrashedError,
)


def run_on_ray(
    jobs: Sequence[Job], settings: LaunchConfig, parallel: int | None
) -> Iterator[tuple[int, Outcome]]:
    """Yield the outcome of each job with its number, as they come; see `many.run_many`.

    Raises:
        ConfigError, StorageError: as in `ray_worker.train_on_ray`, before any job is started.
    """
    connect(dict(chain.from_iterable(reach_stores(job.config).items() for job in jobs)))
    task = ray.remote(
        num_cpus=1, num_gpus=int(wants_gpu(settings)), max_retries=settings.max_failures
    )(run_job)
    waiting = deque(enumerate(jobs))
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < (parallel or len(jobs)):
                number, job = waiting.popleft()
                running[task.remote(job)] = number
            (done,), _ = ray.wait(list(running), num_returns=1)
            yield running.pop(done), _outcome(done, settings)
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)


def _outcome(done: Any, settings: LaunchConfig) -> Outcome:
    try:
        outcome: Outcome = ray.get(done)
    except (WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
        return Outcome(
            error=f"its worker was lost {settings.max_failures + 1} times "
            f"({type(error).__name__}). The same command continues from its newest checkpoint.",
            trace=str(error),
        )
    except RayError as error:
        return Outcome(error=f"Ray could not run it ({type(error).__name__})", trace=str(error))
    return outcome
