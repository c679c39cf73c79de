"""Reference statistics: mean and covariance of the features of real images, kept in a file."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddss_lightning.features import FeatureExtractor
from ddss_lightning.files import replacing
from ddss_lightning.metrics.base import check_real


def gaussian_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Sample mean, shape (d,), and unbiased covariance, shape (d, d), of features of shape (N, d), in float64."""
    features = features.double()
    return features.mean(dim=0), features.T.cov().reshape(features.shape[1], -1)


@dataclass(frozen=True)
class ReferenceStatistics:
    """What the Frechet distance needs to know of the real images, and where it came from.

    The file is an .npz with `mu` and `sigma`, which pytorch-fid, clean-fid and EDM write and read too, and with
    `num` and `metadata` (JSON) of our own.

    Args:
        mean: shape (d,), float64.
        cov: unbiased covariance, shape (d, d), symmetric, float64.
        num: number of images, None if the file does not say.
        metadata: strings and numbers: data set, split, transform; under `extractor` the extractor's `protocol()`.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, or a covariance that is not symmetric.
    """

    mean: Tensor
    cov: Tensor
    num: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        d = self.mean.numel()
        if self.mean.shape != (d,) or self.cov.shape != (d, d):
            raise ValueError(
                "Statistics are a mean of shape (d,) and a covariance of shape (d, d), got "
                f"{tuple(self.mean.shape)} and {tuple(self.cov.shape)}."
            )
        if not isinstance(self.metadata, dict):
            raise ValueError(f"The metadata of statistics are a dictionary, got {self.metadata!r}.")
        if not (self.mean.isfinite().all() and self.cov.isfinite().all()):
            raise ValueError("The statistics hold numbers that are not finite; make them again from finite features.")
        if not torch.allclose(self.cov, self.cov.T, rtol=1e-4, atol=1e-6 * float(self.cov.abs().max())):
            raise ValueError("The covariance of the statistics is not symmetric: the file is damaged.")

    @classmethod
    def from_features(
        cls,
        features: Tensor,
        extractor: FeatureExtractor | None = None,
        **metadata: str | float,
    ) -> ReferenceStatistics:
        """Statistics of features of shape (m, d), m >= 2.

        Args:
            features: of the real images, each once.
            extractor: the network that made them, to be recorded.
            **metadata: whatever a reader must know to make them again, such as `dataset`, `split`, `transform`.

        Raises:
            ValueError: fewer than two vectors, or numbers that are not finite.
        """
        mean, cov = gaussian_moments(check_real(features))
        origin = {} if extractor is None else {"extractor": extractor.protocol()}
        return cls(mean, cov, len(features), {**metadata, **origin})

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the .npz in one piece: a reader sees the whole file or none.

        Raises:
            ValueError: the file exists and `overwrite` is not set, or its name does not end in .npz.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"Statistics are an .npz file, got '{path}'; end the name in .npz.")
        if path.exists() and not overwrite:
            raise ValueError(f"'{path}' exists; give another name or overwrite=True.")
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"mu": self.mean.cpu().numpy(), "sigma": self.cov.cpu().numpy()}
        if self.num is not None:
            arrays["num"] = np.asarray(self.num)
        arrays["metadata"] = np.asarray(json.dumps(self.metadata, sort_keys=True))
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> ReferenceStatistics:
        """Read what `save` wrote, or an .npz of pytorch-fid, clean-fid or EDM (`mu`, `sigma`).

        Such a file of others does not say from how many images, and by which network, it was made.

        Raises:
            ValueError: no such file, a damaged one, or one without `mu` and `sigma`.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"No statistics at '{path}'; write them with `ReferenceStatistics.from_features(...).save(...)`."
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                missing = {"mu", "sigma"} - set(file.files)
                if missing:
                    raise ValueError(f"it holds {', '.join(file.files)}, not {' and '.join(sorted(missing))}")
                mean, cov = (torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))
                num = int(file["num"]) if "num" in file.files else None
                metadata = json.loads(str(file["metadata"])) if "metadata" in file.files else {}
            return cls(mean, cov, num, metadata)
        except (ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"'{path}' holds no statistics that can be used: {error}") from error

    def check(self, extractor: FeatureExtractor) -> None:
        """Make sure that these are statistics of this extractor; a file that does not say passes if the size fits.

        Raises:
            ValueError: another length, other weights, or other resizing.
        """
        theirs = {"num_features": len(self.mean), **self.metadata.get("extractor", {})}
        ours = extractor.protocol()
        other = [
            f"{key} {theirs[key]!r}, here {ours[key]!r}" for key in theirs if key in ours and theirs[key] != ours[key]
        ]
        if other:
            raise ValueError(
                f"The statistics are of another extractor ({'; '.join(other)}): the distance would mean nothing. "
                "Use that extractor, or make the statistics again with this one."
            )
