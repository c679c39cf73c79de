"""`ddss export` and `ddss inspect` on saved samplers and on the output of fits."""

import shutil
import subprocess
import sys

import pytest
import torch

from ddss_lightning.cli import main
from ddss_lightning.commands import _in_words
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.saved import read_card, saved_sampler
from ddss_lightning.scheduler import GGDMScheduler
from tests.conftest import ROOT

SAMPLER = str(ROOT / "checkpoints" / "digits-ggdm-5")


@pytest.fixture
def fits(tmp_path):
    """The log folder of a recipe with two fits."""
    for version in (0, 1):
        shutil.copytree(SAMPLER, tmp_path / "digits" / f"version_{version}" / "sampler")
    return tmp_path / "digits"


def test_inspect_shows_steps_scores_and_draws(tmp_path, capsys):
    main(["inspect", SAMPLER, "--picture", str(tmp_path / "new" / "mu.png")])
    out = capsys.readouterr().out
    assert "GGDMSampler: 5 network calls" in out
    assert "learned for: checkpoints/digits-ddpm" in out
    assert (
        "scores: validation: FID 1.652, IS 9.556, KID -4.524; validation of initial sampler: FID 6.888, IS 9.477, "
        "KID 8.492; validation images 4000, training step 30, seed 0\n"
    ) in out
    assert "state x_k = a * image + std * noise; noise added: standard deviation of the noise that step k adds" in out
    assert (tmp_path / "new" / "mu.png").read_bytes()[1:4] == b"PNG"


def test_scores_of_any_card_can_be_read():
    scores = {"test": {"judge_fid": 0.0123456, "fid": 12345.678}, "num": 100000, "fid": float("nan"), "note": None}
    assert _in_words(scores) == "test: judge FID 0.01235, FID 12346; num 100000, FID nan, note None"
    assert _in_words({"a": {"b": 1}}) == "a: b 1"
    assert _in_words({}) == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py", "--picture must be a PNG file, such as mu.png"),
        ("mine.png", "is already there; give another file or"),
    ],
)
def test_inspect_overwrites_nothing(tmp_path, capsys, name, message):
    (tmp_path / name).write_text("precious")
    with pytest.raises(SystemExit):
        main(["inspect", SAMPLER, "--picture", str(tmp_path / name)])
    assert message in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "precious"
    if name.endswith("png"):
        main(["inspect", SAMPLER, "--picture", str(tmp_path / name), "--overwrite=true"])
        assert (tmp_path / name).read_bytes()[1:4] == b"PNG"


def test_inspect_into_a_closed_pipe_is_silent():
    command = [sys.executable, "-m", "ddss_lightning", "inspect", SAMPLER]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_inspect_colours_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    main(["inspect", SAMPLER])
    out = capsys.readouterr().out
    assert "rows: x_(k+1); columns: x_0 ... x_k, then x0_hat; full colour: +-1.3" in out
    assert "\x1b[48;2;255;0;0m" in out


def test_export_of_a_fit(fits, tmp_path, capsys):
    output = tmp_path / "out"
    main(["export", str(fits / "version_1"), str(output)])
    assert f"wrote 5 steps to '{output}'" in capsys.readouterr().out
    assert GGDMScheduler.from_pretrained(output).config.base_model == "checkpoints/digits-ddpm"
    before = (output / "scheduler_config.json").read_bytes()
    with pytest.raises(SystemExit):
        main(["export", SAMPLER, str(output)])
    assert (
        "already holds scheduler_config.json, scheduler.py, README.md, sampler.json, sampler.safetensors; give another "
        in capsys.readouterr().err
    )
    assert (output / "scheduler_config.json").read_bytes() == before
    main(["export", SAMPLER, str(output), "--overwrite=true"])


def test_what_was_exported_is_the_sampler_too(fits, tmp_path):
    """All that a repository on the hub needs is in one folder."""
    main(["export", str(fits / "version_1"), str(tmp_path / "out")])
    for name in ("sampler.json", "sampler.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (fits / "version_1" / "sampler" / name).read_bytes()
    assert saved_sampler(tmp_path / "out") == tmp_path / "out"
    main(["export", str(tmp_path / "out"), str(tmp_path / "out"), "--overwrite=true"])
    assert GGDMSampler.from_pretrained(tmp_path / "out").num_steps == 5


def test_samplers_of_the_hub(tmp_path, monkeypatch, capsys):
    """By a name with one slash that is no place here; a hub that has no such model, or is out of reach, says so."""
    asked = []

    def download(name, file):
        asked.append(name)
        if name != "someone/digits":
            raise OSError(f"no model {name}")
        return str(ROOT / SAMPLER / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    main(["inspect", "someone/digits"])
    assert "5 network calls" in capsys.readouterr().out
    expected, found = (GGDMSampler.from_pretrained(each).state_dict() for each in (ROOT / SAMPLER, "someone/digits"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert read_card("someone/digits") == read_card(ROOT / SAMPLER)
    with pytest.raises(
        ValueError, match=r"'no/one' could not be fetched from the hub, .*no such folder.*: no model no/one"
    ):
        GGDMSampler.from_pretrained("no/one")
    assert set(asked) == {"someone/digits", "no/one"}
    (tmp_path / "runs").mkdir()
    for nowhere in ("runs/5", "nowhere", "a/b/c"):
        with pytest.raises(ValueError, match=f"There is no folder '{nowhere}'"):
            saved_sampler(nowhere)


def test_where_the_sampler_is(fits):
    assert saved_sampler(fits / "version_0") == fits / "version_0" / "sampler"
    for kind in (GGDMSampler, GGDMScheduler):
        assert kind.from_pretrained(fits / "version_0").num_steps == 5
    with pytest.raises(ValueError, match="holds 2 fits; give one of"):
        saved_sampler(fits)
    shutil.rmtree(fits / "version_1")
    assert saved_sampler(fits) == fits / "version_0" / "sampler"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["export"], "required: sampler, output"),
        (["export", SAMPLER, str(ROOT / "LICENSE")], "LICENSE' is no folder, for"),
        (["export", "nowhere", "x"], "There is no folder 'nowhere'"),
        (["inspect", str(ROOT / "recipes")], "neither 'sampler.json' nor 'sampler/sampler.json' is there"),
        (["inspect", SAMPLER, "--colour=red"], "--colour=red; it is `ddss inspect SAMPLER`, see --help."),
        (["export", "--sampler", SAMPLER], "--sampler; it is `ddss export SAMPLER OUTPUT`, see --help."),
        (["export", SAMPLER, "out", "--overwite=true"], "--overwite=true; did you mean --overwrite? ("),
        (["export", SAMPLER, "/proc/out"], "output: '/proc/out"),
        (["inspect", SAMPLER, "--picture", "/proc/out/mu.png"], "--picture: '/proc/out"),
        (["inspect", SAMPLER, "--overwrite=perhaps"], "overwrite: expected <class 'bool'>, got perhaps. ("),
    ],
)
def test_bad_input_is_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
