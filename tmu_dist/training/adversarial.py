"""Adversarial training: a second kind of training step, with discriminators beside the student.

Each iteration updates the discriminators first, then the student against the updated ones. Least
squares objectives, after Lee et al. 2018.

Legend: B batch, T time, C channels, H, W height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmu_dist.arithmetic import widened
from tmu_dist.config import AdversarialConfig
from tmu_dist.models.rollout import Rollout
from tmu_dist.models.savp.discriminators import ImageDiscriminator, VideoDiscriminator
from tmu_dist.models.shapes import FrameShape
from tmu_dist.training.scaling import LossScaling
from tmu_dist.training.schedules import random_index
from tmu_dist.training.step import TrainingStep
from tmu_dist.transfer.base import LossTerms, Term, TrainingBatch, weighted

ROLLOUT, PRIOR = "rollout", "prior"
"""Kinds of predictions. Of stochastic networks the rollout's latents know the targets, and there
are predictions from latents of the prior, too; of others there is the rollout alone."""


class _Seen(NamedTuple):
    """What the discriminators see of one batch: true frames, and predictions by kind."""

    true_BTCHW: Tensor
    predicted_BTCHW: Mapping[str, Tensor]


class Discriminators(nn.Module):
    """A video and an image discriminator for every kind of prediction; weights are not shared.

    A video discriminator sees a clip, an image discriminator one frame, at a place in time that
    the whole global batch shares.
    """

    def __init__(
        self,
        frame: FrameShape,
        kinds: tuple[str, ...],
        clip_length: int,
        settings: AdversarialConfig,
    ) -> None:
        super().__init__()
        self.clip_length = clip_length
        channels = settings.base_channels
        video = partial(VideoDiscriminator, frame, clip_length=clip_length, base_channels=channels)
        image = partial(ImageDiscriminator, frame, base_channels=channels)
        self.video = _by_kind(video, kinds if settings.video_weight else ())
        self.image = _by_kind(image, kinds if settings.image_weight else ())

    def forward(self, seen: _Seen, clip_start: int, image_index: int) -> Tensor:
        """Objective of all discriminators for each sequence, [B]: true is 1, predicted is 0."""
        losses_B = []
        for look in self.looks(clip_start, image_index):
            predicted = seen.predicted_BTCHW[look.kind]
            # In one pass, which is one power iteration.
            both = torch.cat([seen.true_BTCHW[:, look.place], predicted[:, look.place]])
            true_B, predicted_B = widened(look.network(both)[0]).chunk(2)
            losses_B.append((true_B - 1).square() + predicted_B.square())
        return torch.stack(losses_B).sum(0)

    def looks(self, clip_start: int, image_index: int) -> Iterator[_Look]:
        """Every discriminator, and what it sees."""
        clip = slice(clip_start, clip_start + self.clip_length)
        for kind, network in self.video.items():
            yield _Look("video", kind, network, clip)
        for kind, network in self.image.items():
            yield _Look("image", kind, network, image_index)


class _Look(NamedTuple):
    """A discriminator of one kind of predictions, and the place in time that it sees."""

    what: str
    kind: str
    network: nn.Module
    place: int | slice


class AdversarialStep(TrainingStep):
    """Trains discriminators and the student in turn.

    Args:
        discriminators: on this rank's device.
        discriminate: the same, wrapped for data-parallel training where there are several ranks.
        adversarial: weights of the terms.
        seed: of the places in time that discriminators see.
        step: everything that `TrainingStep` takes.
    """

    def __init__(
        self,
        discriminators: Discriminators,
        discriminate: Callable[..., Tensor],
        adversarial: AdversarialConfig,
        *,
        seed: int,
        **step: Any,
    ) -> None:
        super().__init__(**step)
        self.discriminators = discriminators
        self.discriminate = discriminate
        self.adversarial = adversarial
        self.seed = seed
        self.discriminator_optimizer = self.adam(list(discriminators.parameters()))
        self.discriminator_scaling = LossScaling(self.device, is_on=self.scaling.is_on)

    def loss(self, batch: TrainingBatch) -> LossTerms:
        """Update the discriminators on this batch's predictions, then add what they say of them."""
        terms = super().loss(batch)
        seen = _seen(terms.rollout, batch)
        steps = batch.frames_BTCHW.shape[1] - 1
        places = (
            random_index(
                steps - self.discriminators.clip_length + 1, seed=self.seed, step=batch.step, use=0
            ),
            random_index(steps, seed=self.seed, step=batch.step, use=1),
        )
        loss = self._update_discriminators(seen, places, batch)
        return terms.with_terms(
            self._student_terms(seen, places, batch) | {"discriminators": Term(loss, 0.0)}
        )

    def state_dict(self) -> dict[str, Any]:
        """Also the discriminators and their optimiser."""
        return super().state_dict() | {
            "discriminators": self.discriminators.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "discriminator_scaling": self.discriminator_scaling.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        super().load_state_dict(state)
        self.discriminators.load_state_dict(state["discriminators"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        self.discriminator_scaling.load_state_dict(state.get("discriminator_scaling", {}))

    def facts(self) -> dict[str, float]:
        """Also those of the discriminators' updates."""
        theirs = self.discriminator_scaling.facts(self.discriminator_optimizer)
        return super().facts() | {f"discriminator_{name}": each for name, each in theirs.items()}

    def _update_discriminators(
        self, seen: _Seen, places: tuple[int, int], batch: TrainingBatch
    ) -> Tensor:
        self.discriminators.train().requires_grad_(True)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        detached = {kind: frames.detach() for kind, frames in seen.predicted_BTCHW.items()}
        loss_B = self.discriminate(seen._replace(predicted_BTCHW=detached), *places)
        loss = weighted(loss_B, batch)
        self.discriminator_scaling.backward(loss)
        self.discriminator_scaling.unscale(self.discriminator_optimizer)
        self.update(self.discriminator_optimizer, self.discriminator_scaling, batch.step)
        return loss.detach()

    def _student_terms(
        self, seen: _Seen, places: tuple[int, int], batch: TrainingBatch
    ) -> dict[str, Term]:
        # In eval mode the discriminators' spectral norms stay as the update above left them.
        self.discriminators.eval().requires_grad_(False)
        weights = {"video": self.adversarial.video_weight, "image": self.adversarial.image_weight}
        fooling_B: dict[str, list[Tensor]] = {
            what: [] for what, weight in weights.items() if weight
        }
        matching_B: list[Tensor] = []
        for what, kind, network, place in self.discriminators.looks(*places):
            score_B, features = network(seen.predicted_BTCHW[kind][:, place])
            fooling_B[what].append((widened(score_B) - 1).square())
            if kind == ROLLOUT and self.adversarial.feature_weight:
                with torch.no_grad():
                    _, true_features = network(seen.true_BTCHW[:, place])
                matching_B += map(_feature_distance, true_features, features)
        terms = {
            f"adversarial_{what}": Term(weighted(torch.stack(each).sum(0), batch), weights[what])
            for what, each in fooling_B.items()
        }
        if matching_B:
            matching = weighted(torch.stack(matching_B).sum(0), batch)
            terms["feature_matching"] = Term(matching, self.adversarial.feature_weight)
        return terms


def _seen(rollout: Rollout, batch: TrainingBatch) -> _Seen:
    """True and predicted frames 2..T; what was not observed is 0 in all of them."""
    predicted = {ROLLOUT: rollout.predictions_BTCHW}
    if rollout.prior_predictions_BTCHW is not None:
        predicted[PRIOR] = rollout.prior_predictions_BTCHW
    if batch.observed_BTCHW is not None:
        hidden = ~batch.observed_BTCHW[:, 1:]
        predicted = {kind: each.masked_fill(hidden, 0.0) for kind, each in predicted.items()}
    return _Seen(batch.frames_BTCHW[:, 1:], predicted)


def _feature_distance(true: Tensor, predicted: Tensor) -> Tensor:
    """1 - cosine over channels, averaged over places, [B]; its eps is nothing in half precision."""
    difference = F.normalize(widened(true), dim=1) - F.normalize(widened(predicted), dim=1)
    return difference.square().sum(1).mul(0.5).flatten(1).mean(1)


def _by_kind(make: Callable[[], nn.Module], kinds: tuple[str, ...]) -> nn.ModuleDict:
    return nn.ModuleDict({kind: make() for kind in kinds})
