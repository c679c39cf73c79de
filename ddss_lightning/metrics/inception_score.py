"""Inception Score."""

from __future__ import annotations

import torch
from torch import Tensor

from ddss_lightning.features import FeatureExtractor
from ddss_lightning.metrics.base import SampleMetric


class InceptionScore(SampleMetric):
    r"""exp(E_x KL(p(y|x) || p(y))) of class logits, from summable float64 states.

    .. math:: \log IS = E_x \sum_y p(y|x) \log p(y|x) - \sum_y p(y) \log p(y), \qquad p(y) = E_x p(y|x)

    Between 1 (all images look alike, or unrecognisable) and the number of classes. With one split the score is that
    of all images at once; with s splits it is the mean over the s sets of images whose global index is 0, ..., s - 1
    modulo s, each with its own p(y), with their standard deviation (of the population). Splits of fewer images
    score lower: the number of images and of splits belong to the figure.

    Args:
        num_classes: length of the logits.
        splits: number of splits; the literature uses 10.
        features: a network with `logits`, if `update` is to take images.

    Raises:
        ValueError: no class or no split; a split without images when computed.

    References:
        Salimans et al., "Improved Techniques for Training GANs", 2016, https://arxiv.org/abs/1606.03498, section 4.
    """

    higher_is_better = True
    # Samples are counted on from those before: a batch on its own, as `forward` has it by default, begins anew.
    full_state_update = True
    num: Tensor
    probability: Tensor
    negative_entropy: Tensor

    def __init__(self, num_classes: int, splits: int = 1, features: FeatureExtractor | None = None) -> None:
        if num_classes < 1 or splits < 1:
            raise ValueError(f"num_classes and splits must be at least 1, got {num_classes} and {splits}.")
        super().__init__(num_classes, features)
        self.splits = splits
        self.add_state("num", torch.zeros(splits, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("probability", torch.zeros(splits, num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("negative_entropy", torch.zeros(splits, dtype=torch.float64), dist_reduce_fx="sum")

    def represent(self, network: FeatureExtractor, images: Tensor) -> Tensor:
        """Class logits."""
        return network.logits(network(images))

    def update(self, samples: Tensor, indices: Tensor | None = None) -> None:
        """Add generated samples.

        Args:
            samples: class logits, shape (n, num_classes); images, shape (n, C, H, W), if the metric has a network.
            indices: number of each sample in the whole set, shape (n,), int64: it decides on the split. Without it
                samples are counted as they come, which is possible in one process only.

        Raises:
            TypeError: images that are not floats.
            ValueError: wrong shapes, images outside [-1, 1], numbers that are not finite, or no indices for splits in
                several processes.
        """
        log_probability = self.vectors(samples).log_softmax(1)
        if indices is None:
            indices = self._count(len(log_probability))
        elif indices.shape != (len(log_probability),) or indices.is_floating_point():
            raise ValueError(
                f"indices must be {len(log_probability)} integers, one for each sample, got {indices.dtype} of shape "
                f"{tuple(indices.shape)}."
            )
        split = indices.to(log_probability.device, torch.long) % self.splits
        probability = log_probability.exp()
        self.num.index_add_(0, split, torch.ones_like(split))
        self.probability.index_add_(0, split, probability)
        self.negative_entropy.index_add_(0, split, (probability * log_probability).sum(1))

    def _count(self, num: int) -> Tensor:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.splits > 1 and distributed and torch.distributed.get_world_size() > 1:
            raise ValueError(
                f"An Inception Score of {self.splits} splits in several processes needs to know which sample is in "
                "which split: give `indices`, the global index of each sample."
            )
        return torch.arange(num, device=self.num.device) + self.num.sum()

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The score; with several splits `is_mean` and `is_std`."""
        if (self.num == 0).any():
            raise ValueError(
                f"The Inception Score needs at least one image in each of {self.splits} splits, got "
                f"{self.num.tolist()}."
            )
        marginal = self.probability / self.num[:, None]
        scores = (self.negative_entropy / self.num - torch.xlogy(marginal, marginal).sum(1)).exp()
        return scores[0] if self.splits == 1 else {"is_mean": scores.mean(), "is_std": scores.std(correction=0)}
