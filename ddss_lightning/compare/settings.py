"""What is compared, and with how many images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddss_lightning.features import FeatureExtractor
from ddss_lightning.handmade import SOLVERS

DEFAULT_SOLVERS = ("DDPM", "DDIM", "DPM-Solver++ 2M", "DPM-Solver++ 3M", "UniPC 3")


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        steps: numbers of network calls.
        solvers: names of `SOLVERS`; `["all"]` for all of them; none for learned samplers only.
        samplers: folders of learned samplers, each as `FOLDER` or `LABEL=FOLDER`. Samplers of one label are one curve,
            each of another number of calls. `{seed}` in a folder stands for the seed of the noise: what was learned
            with a seed is scored on the test noise of that seed. A folder with `=` in its name is `./FOLDER`.
        judge: a second feature network, or the folder of one, in which the same images are scored too; it chooses
            nothing.
        seeds: of the noise; with the first one the spacings of solvers are chosen.
        num_images: images of the test noise per score.
        selection_images: images of the validation noise by which the spacing of a solver's calls is chosen.
        output: the folder for scores, tables and pictures.

    Raises:
        ValueError: an unknown solver, no number of steps or seed, or numbers below 1 (`steps`), 6 (`num_images`) and 2
            (`selection_images`).
    """

    steps: Sequence[int] = (5, 10, 20)
    solvers: Sequence[str] = DEFAULT_SOLVERS
    samplers: Sequence[str] = ()
    judge: FeatureExtractor | str | Path | None = None
    seeds: Sequence[int] = (0,)
    num_images: int = 10_000
    selection_images: int = 2000
    output: Path = Path("compare")

    def __post_init__(self) -> None:
        unknown = [name for name in self.solvers if name not in SOLVERS and list(self.solvers) != ["all"]]
        if unknown:
            raise ValueError(
                f"Unknown solver '{unknown[0]}'; choose any of {', '.join(SOLVERS)}, or all; --solvers without a name "
                "compares learned samplers only."
            )
        # Precision and recall look at the five nearest neighbours.
        for name, least in {"num_images": 6, "selection_images": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}.")
        for name in ("steps", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name} must name at least one, got none.")
        if min(self.steps) < 1:
            raise ValueError(f"--steps must be at least 1, got {min(self.steps)}.")
        object.__setattr__(self, "output", Path(self.output))
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"--output: '{self.output}' is no folder; give another one.")
        # What is named twice is one thing to measure.
        object.__setattr__(self, "steps", list(dict.fromkeys(self.steps)))
        object.__setattr__(self, "seeds", list(dict.fromkeys(self.seeds)))

    @property
    def solver_names(self) -> list[str]:
        """All solvers to compare, by name, each once."""
        return list(SOLVERS) if list(self.solvers) == ["all"] else list(dict.fromkeys(self.solvers))
