"""The Python of the README and of the pages in docs/ runs as it stands; links in all documents lead somewhere."""

import re

import lightning.pytorch

# Its command line takes the Trainer that it finds when it is imported: not the short one.
import lightning.pytorch.cli
import pytest

from tests.conftest import ROOT


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if blocks(page)]


def run(page, tmp_path, monkeypatch):
    """All blocks in order, in a folder where `checkpoints` and `recipes` are the shipped ones and `runs` is new."""
    for name in ("checkpoints", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in blocks(page):
        exec(block, scope)
    return scope


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_run(page, tmp_path, monkeypatch):
    """Every line as it stands, but the Trainer takes two steps and validates on two batches."""

    class ShortTrainer(lightning.pytorch.Trainer):
        def __init__(self, **options):
            super().__init__(**{**options, "max_steps": 2, "limit_val_batches": 1, "limit_train_batches": 2})

    monkeypatch.setattr(lightning.pytorch, "Trainer", ShortTrainer)
    scope = run(page, tmp_path, monkeypatch)
    if page.name == "README.md":
        assert (tmp_path / "runs" / "my-sampler" / "sampler.json").is_file()
        assert len(scope["images"]) == 4
        assert scope["sampler"].num_steps == 5


@pytest.mark.slow
def test_python_examples_run_whole(tmp_path, monkeypatch):
    scope = run(ROOT / "README.md", tmp_path, monkeypatch)
    (quality,) = [c for c in scope["module"].trainer.callbacks if isinstance(c, scope["SampleQuality"])]
    assert quality.best["fid"] < quality.initial["fid"]


def anchor(heading):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).replace(" ", "-")


DOCUMENTS = [ROOT / name for name in ("README.md", "CHANGELOG.md")]
DOCUMENTS += [page for name in ("docs", "recipes", "checkpoints", "benchmarks") for page in (ROOT / name).rglob("*.md")]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for path, _, heading in (link.partition("#") for link in links if not link.startswith("http")):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {path}"
        if heading:
            lines = target.read_text().splitlines()
            assert heading in {anchor(line) for line in lines if line.startswith("#")}, f"{page}: {path}#{heading}"
