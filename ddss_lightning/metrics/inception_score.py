"""Inception Score."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class InceptionScore(Metric):
    r"""exp(E_x KL(p(y|x) || p(y))) of class logits, over all images at once (one split), from summable float64 states.

    .. math:: \log IS = E_x \sum_y p(y|x) \log p(y|x) - \sum_y p(y) \log p(y), \qquad p(y) = E_x p(y|x)

    Between 1 (all images look alike, or unrecognisable) and the number of classes.

    Args:
        num_classes: length of the logits.

    Raises:
        ValueError: nothing to score when computed.

    References:
        Salimans et al., "Improved Techniques for Training GANs", 2016, https://arxiv.org/abs/1606.03498, section 4.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    num: Tensor
    probability: Tensor
    negative_entropy: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("num", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("probability", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("negative_entropy", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Add class logits of generated images, shape (n, num_classes)."""
        log_probability = logits.double().log_softmax(1)
        self.num += len(logits)
        self.probability += log_probability.exp().sum(0)
        self.negative_entropy += (log_probability.exp() * log_probability).sum()

    def compute(self) -> Tensor:
        """The score."""
        if self.num == 0:
            raise ValueError("The Inception Score needs at least one image.")
        marginal = self.probability / self.num
        return (self.negative_entropy / self.num - torch.xlogy(marginal, marginal).sum()).exp()
