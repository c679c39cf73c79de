"""What stands for comparison: solvers with each placement of their calls, and learned samplers from disk."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_info

from ddss_lightning.compare.settings import Comparison
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.handmade import SOLVERS, NoSuchCallsError, solver_samplers
from ddss_lightning.sampling import SamplingModule
from ddss_lightning.saved import read_card, saved_sampler


@dataclass(frozen=True)
class Candidate:
    """A sampler to be scored: a solver with one placement of its calls, or a learned one from a folder."""

    name: str
    nfe: int
    spacing: str
    sampler: GGDMSampler
    folder: str = ""

    @property
    def origin(self) -> str:
        """Where its numbers come from, whatever label it has."""
        return f"learned ({self.folder})" if self.folder else self.name

    def key(self) -> str:
        """Identifies its numbers."""
        numbers = json.dumps(self.sampler.coefficients().detach().to_lists())
        return hashlib.sha256(numbers.encode()).hexdigest()[:16]


def solver_candidates(module: SamplingModule, name: str, nfe: int) -> list[Candidate]:
    """All placements of a solver that make exactly `nfe` network calls.

    Raises:
        NoSuchCallsError: there is none, see `solver_samplers`.
    """
    samplers = solver_samplers(name, module.denoiser.schedule, module.denoiser.prediction_type, nfe)
    return [Candidate(name, nfe, spacing, sampler) for spacing, sampler in samplers]


def learned_candidates(
    module: SamplingModule, samplers: Sequence[str], seeds: Sequence[int]
) -> list[dict[int, Candidate]]:
    """Samplers from disk, checked against the model: for each of `samplers` (see `Comparison`) the one of each seed.

    Raises:
        ValueError: nothing there, a sampler that was learned for another model, one folder twice, one label for two
            samplers of as many calls, or the name of a solver as a label.
    """
    found: list[dict[int, Candidate]] = []
    given: dict[tuple[str, int], str] = {}
    folders = [_label_and_folder(text)[1] for text in samplers]
    for text in samplers:
        label, folder = _label_and_folder(text)
        if folders.count(folder) > 1:
            raise ValueError(f"'{folder}' is given {folders.count(folder)} times; give every sampler once.")
        if label in SOLVERS:
            raise ValueError(f"The label of '{text}' is the name of a solver; give another label.")
        by_seed = _of_seeds(module, label, folder, seeds)
        key = label, by_seed[seeds[0]].nfe
        if key in given:
            raise ValueError(
                f"'{given[key]}' and '{folder}' both make {key[1]} network calls and have the label '{label}'; give "
                "them two labels, or for samplers of several seeds one folder with {seed} in its name."
            )
        given[key] = folder
        found.append(by_seed)
    return found


def _label_and_folder(text: str) -> tuple[str, str]:
    match = re.fullmatch("([^=/]+)=(.+)", text)
    return (match[1], match[2]) if match else (f"learned ({text})", text)


def _of_seeds(module: SamplingModule, label: str, folder: str, seeds: Sequence[int]) -> dict[int, Candidate]:
    found: dict[int, Candidate] = {}
    for seed in seeds:
        mine = folder.replace("{seed}", str(seed))
        same = [candidate for candidate in found.values() if candidate.folder == mine]
        try:
            found[seed] = same[0] if same else _learned(module, label, mine)
        except ValueError as error:
            where = f"'{folder}' has no sampler for seed {seed} of --seeds: " if mine != folder else ""
            raise ValueError(f"{where}{error}") from error
    calls = {candidate.nfe for candidate in found.values()}
    if len(calls) > 1:
        raise ValueError(
            f"The samplers of '{folder}' make {' or '.join(map(str, sorted(calls)))} network calls, depending on the "
            "seed; give samplers of one number of calls."
        )
    return found


def _learned(module: SamplingModule, label: str, folder: str) -> Candidate:
    path = saved_sampler(folder)
    module.load_sampler(path)
    return Candidate(label, int(read_card(path)["nfe"]), "learned", module.sampler, folder)


def _check_calls(learned: Sequence[Candidate], steps: Sequence[int]) -> None:
    # Before the solvers are scored for hours: whoever names samplers wants to see them in the table.
    if learned and not any(candidate.nfe in steps for candidate in learned):
        calls = ", ".join(f"'{candidate.folder}' makes {candidate.nfe}" for candidate in learned)
        raise ValueError(f"None of --samplers makes {list(steps)} network calls ({calls}); give other --steps.")


# For each seed of the noise the placements of which the best is taken: for a solver always the same, for a learned
# sampler one, which may differ between seeds.
Contender = dict[int, list[Candidate]]


def contenders(module: SamplingModule, settings: Comparison) -> list[Contender]:
    """What is compared, by number of calls: a row of the table each.

    Raises:
        ValueError: a sampler of another model, samplers of which none makes as many calls as asked for, or nothing to
            compare.
    """
    learned = [
        {seed: [candidate] for seed, candidate in by_seed.items()}
        for by_seed in learned_candidates(module, settings.samplers, settings.seeds)
    ]
    first = settings.seeds[0]
    if not settings.solver_names and not learned:
        raise ValueError("Nothing to compare: give --solvers or --samplers.")
    _check_calls([contender[first][0] for contender in learned], settings.steps)
    found: list[Contender] = []
    said: set[str] = set()
    for nfe in settings.steps:
        for name in settings.solver_names:
            try:
                found.append(dict.fromkeys(settings.seeds, solver_candidates(module, name, nfe)))
            except NoSuchCallsError as error:
                # What is not for a model is so for all numbers of calls.
                if str(error) not in said:
                    rank_zero_info(f"left out: {error}")
                said.add(str(error))
        found += [contender for contender in learned if contender[first][0].nfe == nfe]
    for contender in learned:
        if contender[first][0].nfe not in settings.steps:
            candidate = contender[first][0]
            rank_zero_info(f"left out: '{candidate.folder}' makes {candidate.nfe} network calls, which --steps lacks.")
    if not found:
        raise ValueError(f"Nothing to compare: no solver makes {list(settings.steps)} network calls.")
    return found
