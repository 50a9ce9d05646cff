"""From a run's settings to its training step: the one place that chooses the kind of step."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tmu_dist.collectives import Collectives
from tmu_dist.config import ConfigError, RunConfig
from tmu_dist.models.rollout import Predictor
from tmu_dist.training.adversarial import PRIOR, ROLLOUT, AdversarialStep, Discriminators
from tmu_dist.training.graphed import CUDARecorder
from tmu_dist.training.rates import rate_groups
from tmu_dist.training.schedules import learning_rate
from tmu_dist.training.step import TrainingStep
from tmu_dist.transfer.base import TransferMethod

Module = TypeVar("Module", bound=nn.Module)


def build_step(
    config: RunConfig,
    method: TransferMethod,
    student: Predictor,
    trainee: nn.Module,
    device: torch.device,
    collectives: Collectives,
) -> TrainingStep:
    """The step that trains a student, on all ranks; call it on all of them at once.

    Args:
        config: the run.
        method: whose objective is minimised.
        student: on `device`.
        trainee: what is trained (`TransferMethod.trainee`), on `device`.
        device: of this rank.
        collectives: the ranks.

    Raises:
        ConfigError: `training.rates` does not go with the trainee's parameters, the device has not
            the precision, or nothing can be recorded that is to be.
    """
    training = config.training
    is_recorded = uses_graph(config, method, device, collectives.ranks.world_size)
    groups = rate_groups(student, trainee, of_method=method.rates(), chosen=training.rates)
    wrap = partial(_data_parallel, device=device, collectives=collectives)
    step: dict[str, Any] = {
        "method": method,
        "student": student,
        "trainee": trainee,
        "forward": wrap(trainee),
        "groups": groups,
        "device": device,
        "learning_rate": partial(learning_rate, settings=training),
        "adam_beta1": training.adam_beta1,
        "reverse_input": training.reverse_input,
        "grad_clip_norm": training.grad_clip_norm,
        "sequences_at_once": config.scale.sequences_at_once,
        "precision": training.precision,
        "recorder": CUDARecorder(device) if is_recorded else None,
    }
    if not training.adversarial.is_on:
        return TrainingStep(**step)
    kinds = (ROLLOUT, PRIOR) if student.latent_size else (ROLLOUT,)
    clip_length = min(training.adversarial.clip_length, config.window.num_frames - 1)
    discriminators = Discriminators(method.task.frame, kinds, clip_length, training.adversarial).to(
        device
    )
    student.unrolls_prior = PRIOR in kinds
    return AdversarialStep(
        discriminators, wrap(discriminators), training.adversarial, seed=training.seed, **step
    )


def uses_graph(
    config: RunConfig, method: TransferMethod, device: torch.device, world_size: int
) -> bool:
    """Whether the step is recorded as a CUDA graph (`compute.cuda_graph`).

    Raises:
        ConfigError: it is to be, and cannot.
    """
    if config.compute.cuda_graph == "off":
        return False
    if obstacle := _obstacle(config, method, device, world_size):
        raise ConfigError(
            f"compute.cuda_graph=on is not possible: {obstacle}. Leave it off, or change that."
        )
    return True


def _obstacle(
    config: RunConfig, method: TransferMethod, device: torch.device, world_size: int
) -> str | None:
    """What keeps a step from being recorded."""
    if device.type != "cuda":
        return f"this process computes on {device.type}, and only CUDA devices have such graphs"
    if world_size > 1:
        return f"{world_size} ranks exchange gradients during the backward pass"
    if config.training.adversarial.is_on:
        return "training.adversarial updates discriminators within the student's objective"
    kind = config.placement.kind
    if config.transfer.runs_teachers_beside and kind not in ("auto", "replicated"):
        return f"placement.kind={kind} needs the host for what teachers tell"
    return method.unsteady


def _data_parallel(module: Module, *, device: torch.device, collectives: Collectives) -> nn.Module:
    if collectives.ranks.world_size == 1:
        return module
    return DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
