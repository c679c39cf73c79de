"""Imports point one way, and only the rooms that need lightning import it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ddss_lightning"

# Room -> rooms it may import.
ALLOWED = {
    "files": set(),
    "frozen": set(),
    "images": set(),
    "noise": set(),
    "precision": set(),
    "schedule": set(),
    "coefficients": set(),
    "signals": set(),
    "suggestions": set(),
    "features": {"denoisers", "files", "frozen"},
    "losses": {"features", "frozen"},
    "metrics": {"features", "files", "losses", "precision"},
    "denoisers": {"coefficients", "files", "frozen", "noise", "schedule", "scheduler"},
    "solvers": {"schedule", "coefficients"},
    "remat": {"frozen"},
    "unroll": {"coefficients", "frozen", "remat"},
    "replay": {"coefficients", "frozen", "unroll"},
    "probing": {"schedule", "coefficients", "suggestions", "unroll"},
    "anchors": {"schedule", "coefficients", "solvers", "probing"},
    "saved": {"files"},
    "ggdm": {"anchors", "coefficients", "probing", "remat", "saved", "schedule", "solvers", "unroll"},
    "scheduler": set(),
    "handmade": {"ggdm", "schedule", "solvers"},
    "pictures": {"coefficients", "files", "images"},
    "glyphs": set(),
    "data": {"files", "glyphs", "noise"},
    "full_matrix_adam": set(),
    "gauss_newton": {"losses"},
    "teacher": {"denoisers", "files", "ggdm", "images", "noise", "schedule", "solvers"},
    "teacher_batches": {"denoisers", "teacher"},
    "sampling": {"denoisers", "features", "ggdm", "images", "noise", "precision", "remat", "saved"},
    "sample_moments": {"denoisers", "images", "losses", "noise", "precision", "replay", "sampling"},
    "first_calls": {"denoisers", "features", "frozen", "ggdm", "losses"},
    "module": {
        "denoisers",
        "features",
        "first_calls",
        "full_matrix_adam",
        "gauss_newton",
        "ggdm",
        "images",
        "losses",
        "noise",
        "precision",
        "sample_moments",
        "sampling",
        "signals",
        "teacher",
        "teacher_batches",
    },
    "callbacks": {
        "features",
        "files",
        "ggdm",
        "images",
        "metrics",
        "pictures",
        "precision",
        "sampling",
        "saved",
        "signals",
    },
    "cost": {"features", "ggdm", "losses", "module", "replay"},
    "commands": {"files", "ggdm", "pictures", "saved", "scheduler"},
    "compare": {
        "callbacks",
        "commands",
        "data",
        "features",
        "files",
        "ggdm",
        "handmade",
        "pictures",
        "sampling",
        "saved",
        "signals",
    },
    "__main__": {"cli"},
    "cli": {
        "commands",
        "compare",
        "callbacks",
        "data",
        "denoisers",
        "features",
        "files",
        "ggdm",
        "losses",
        "module",
        "saved",
        "schedule",
        "suggestions",
    },
}
LIGHTNING = {
    "signals",
    "sampling",
    "sample_moments",
    "first_calls",
    "module",
    "callbacks",
    "data",
    "compare",
    "cli",
    "__main__",
}
LATE = {"diffusers", "torchvision", "lpips", "torch_fidelity", "transformers", "matplotlib", "sklearn", "PIL"}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room, tree = room_of(path), ast.parse(path.read_text())
    names = list(imports_of(tree))
    ours = {name.split(".")[1] for name in names if name.startswith("ddss_lightning.")} - {room}
    assert ours <= ALLOWED[room], f"{room} may not import {ours - ALLOWED[room]}"
    if room not in LIGHTNING:
        assert not [name for name in names if name.split(".")[0] == "lightning"], f"{room} may not import lightning"
    top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    # A class of diffusers needs its base class; this room travels with models and stands alone.
    allowed = {"diffusers"} if room == "scheduler" else set()
    late = {name.split(".")[0] for n in top for name in imports_of(ast.Module([n], []))} & LATE - allowed
    assert not late, f"{late} must be imported where it is used"


def test_the_rooms_have_no_cycle():
    done = set()
    while len(done) < len(ALLOWED):
        ready = {room for room, needs in ALLOWED.items() if needs <= done} - done
        assert ready, "a cycle"
        done |= ready


def test_sampler_is_usable_without_lightning_and_import_is_cheap():
    code = (
        "import sys; from ddss_lightning import GGDMSampler, NoiseSchedule, KIDLoss, DiffusersDenoiser;"
        f"print(sorted(({{'lightning'}} | {LATE!r}) & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_exist():
    import ddss_lightning

    for name in ddss_lightning.__all__:
        assert getattr(ddss_lightning, name).__name__ == name
    assert set(ddss_lightning.__all__) <= set(dir(ddss_lightning))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ddss_lightning.nothing  # noqa: B018
