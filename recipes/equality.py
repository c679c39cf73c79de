"""Tables of `docs/samplers.md`: coefficients of imported diffusers schedulers against the schedulers' own loops.

    python recipes/equality.py

The FID of imported solvers is measured by `ddss compare`; that page has the command.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import diffusers

from ddss_lightning.probing import probe, rollout_error

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Print the table of the largest error over 3, 5, 10 and 20 steps, and of the refused schedulers."""
    sys.path.insert(0, str(ROOT))
    from tests.test_probing import REFUSED, SUPPORTED

    print("| scheduler | options | largest relative error |\n|---|---|---|")
    for name, (_, cases) in SUPPORTED.items():
        for options in cases:
            scheduler = getattr(diffusers, name)(**options)
            smallest = 4 if options.get("skip_prk_steps") is False else 3
            error = max(rollout_error(probe(scheduler, n), scheduler, n) for n in (smallest, 5, 10, 20))
            shown = ", ".join(f"{key}={value}" for key, value in options.items())
            print(f"| `{name}` | {shown} | {error:.0e} |")
    print("\n| refused | why |\n|---|---|")
    for name, (options, _) in REFUSED.items():
        try:
            probe(getattr(diffusers, name)(**options), 5)
        except ValueError as error:
            print(f"| `{name}` | {' '.join(str(error).split())} |")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
