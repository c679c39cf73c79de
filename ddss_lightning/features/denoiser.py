"""What a diffusion model's own network sees in images, as feature space."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddss_lightning.denoisers import DiffusersDenoiser
from ddss_lightning.denoisers.diffusers import NoNullLabelError
from ddss_lightning.features.base import FeatureExtractor

# Variances of dead channels have a square root with a finite slope.
EPSILON = 1e-4


class DenoiserFeatures(FeatureExtractor):
    r"""Mean and standard deviation over positions of every channel on the way down and in the middle of a U-Net.

    .. math::
        \phi(x) = (\mathrm{mean}_{hw} h_l, (\mathrm{var}_{hw} h_l + 10^{-4})^{1/2})_l

    where h_l are the outputs of the down blocks and of the middle block for the state alpha_t x, without noise, at the
    time t where log(alpha_t / sigma_t) = `logsnr`. Nothing else than the model is needed: a network that can take noise
    out of images of a kind has learned what such images are made of. In a loss it sees what a classifier was trained to
    ignore; as the only space it would let a model judge itself.

    Args:
        denoiser: of a pixel model, with a `UNet2DModel`; shared, not copied. A network of classes is shown its null
            label, whatever its `guidance_scale`.
        logsnr: half log-SNR of the time. Near the image, where little noise is left to be seen: 1.75 is timestep 50 of
            the 1000 of linear betas.

    Raises:
        ValueError: a latent model, a network without down blocks or of classes without a null label, or a `logsnr`
            that is not finite.

    References:
        Baranchuk et al., "Label-Efficient Semantic Segmentation with Diffusion Models", ICLR 2022,
        https://arxiv.org/abs/2112.03126, for the activations of denoisers as representation of images.
    """

    def __init__(self, denoiser: DiffusersDenoiser, logsnr: float = 1.75) -> None:
        super().__init__()
        if denoiser.vae is not None:
            raise ValueError(
                f"The model '{denoiser.name}' denoises latents, not images: it has no features of images; use another "
                "feature network."
            )
        if not math.isfinite(logsnr):
            raise ValueError(f"logsnr must be a finite number, got {logsnr}.")
        if not hasattr(denoiser.unet, "down_blocks"):
            raise ValueError(
                f"The network of '{denoiser.name}' is a {type(denoiser.unet).__name__} without `down_blocks`; "
                "DenoiserFeatures needs a U-Net of diffusers."
            )
        try:
            self.denoiser = denoiser.unguided()
        except NoNullLabelError as error:
            raise ValueError(_no_null_label(denoiser.name)) from error
        self.image_shape = denoiser.image_shape
        device = denoiser.schedule.table.device
        time = denoiser.schedule.timestep(torch.tensor(logsnr, dtype=torch.float64, device=device))
        # Part of the fingerprint.
        self.register_buffer("timestep", time.float())
        self._scale = float(denoiser.schedule.alpha_sigma(time)[0])
        self.freeze()
        with torch.no_grad():
            self.num_features = self(torch.zeros(1, *self.image_shape, dtype=self.dtype, device=device)).shape[1]

    @classmethod
    def from_pretrained(
        cls, pretrained_path: str, logsnr: float = 1.75, null_label: int | None = None
    ) -> DenoiserFeatures:
        """Of the diffusers pipeline in a folder or on the hub.

        Args:
            pretrained_path: see `DiffusersDenoiser.from_pretrained`.
            logsnr: see the class.
            null_label: of a network with classes, see `DiffusersDenoiser.from_pretrained`.

        Raises:
            ValueError: as there and in the constructor.
        """
        try:
            denoiser = DiffusersDenoiser.from_pretrained(pretrained_path, null_label)
        except NoNullLabelError as error:
            raise ValueError(_no_null_label(pretrained_path)) from error
        return cls(denoiser, logsnr)

    def forward(self, images: Tensor) -> Tensor:
        """Features, shape (N, d), of images of shape (N, *image_shape) in [-1, 1].

        Raises:
            ValueError: the images have another shape.
        """
        self.check_input(images)
        unet: Any = self.denoiser.unet
        blocks = [*unet.down_blocks, unet.mid_block]
        seen: list[Tensor] = []

        def see(_block: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen.append(output if isinstance(output, Tensor) else output[0])

        hooks = [block.register_forward_hook(see) for block in blocks if block is not None]
        try:
            self.denoiser(self._scale * images, self.get_buffer("timestep").expand(len(images)))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(
            [part for h in seen for part in (h.mean((2, 3)), (h.var((2, 3), correction=0) + EPSILON).sqrt())], 1
        )


def _no_null_label(name: str) -> str:
    return (
        f"DenoiserFeatures of '{name}' (of the loss `unet` in own_model.yaml): the network has classes. Give these "
        "features, too, the null_label that it was trained with, in their init_args. A network that was trained "
        "without one has no features of images of any class: delete this loss, and its weight."
    )
