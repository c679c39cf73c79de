"""Killed and resumed, a fit ends with the same numbers; no file is ever half written."""

import json
import os
import random
import subprocess
import sys
import textwrap

import pytest
import torch

from ddss_lightning import GGDMSampler
from tests.conftest import ROOT

PLACES = ("before the step", "in the step", "after the step", "in validation", "after the epoch", "saving")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(folder, world_size, plans):
    command = [sys.executable, "-m", "tests.interruption_script", str(folder), str(world_size), json.dumps(plans)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("STATUSES ")]
    assert len(lines) == 1, done.stderr[-3000:]
    statuses = json.loads(lines[0].removeprefix("STATUSES "))
    expected = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "none": 0}
    assert statuses == [*(expected[plan["signal"]] for plan in plans), 0], done.stderr[-3000:]
    return torch.load(folder / "last.ckpt", weights_only=True)


def numbers(value, path=""):
    """Path -> number or text or tensor, of everything in a checkpoint."""
    if isinstance(value, dict):
        return {key: each for name in value for key, each in numbers(value[name], f"{path}.{name}").items()}
    if isinstance(value, (list, tuple)):
        return {key: each for i, item in enumerate(value) for key, each in numbers(item, f"{path}.{i}").items()}
    return {path: value}


def learned(checkpoint):
    """What a fit has learned: sampler, its average, optimiser, schedule, the best sampler and its scores."""
    names = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step", "epoch")
    return numbers({name: checkpoint[name] for name in names})


def plans_of(seed, count, places=PLACES, ranks=1):
    draw = random.Random(seed)
    signals = ["SIGKILL", "SIGTERM"] * (count // 2)
    return [
        {"signal": name, "steps": draw.randint(1, 5), "place": draw.choice(places), "rank": draw.randrange(ranks)}
        for name in signals
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "fit"
    return folder, run(folder, 1, [])


def assert_bit_equal(whole, folder, checkpoint):
    expected, found = learned(whole[1]), learned(checkpoint)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name], name
    for name in ("sampler.json", "sampler.safetensors"):
        assert (whole[0] / "sampler" / name).read_bytes() == (folder / "sampler" / name).read_bytes()


def test_three_times_killed_is_bit_equal(tmp_path, whole):
    plans = [
        {"signal": "SIGKILL", "steps": 5, "place": "saving"},
        {"signal": "SIGTERM", "steps": 4, "place": "in the step"},
        {"signal": "SIGINT", "steps": 2, "place": "in validation"},
    ]
    assert_bit_equal(whole, tmp_path / "fit", run(tmp_path / "fit", 1, plans))


def test_told_to_stop_while_the_initial_sampler_is_scored(tmp_path, whole):
    plan = {"signal": "SIGTERM", "place": "the initial sampler"}
    assert_bit_equal(whole, tmp_path / "fit", run(tmp_path / "fit", 1, [plan]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ten_times_killed_is_bit_equal(tmp_path, whole, seed):
    assert_bit_equal(whole, tmp_path / "fit", run(tmp_path / "fit", 1, plans_of(seed, 10)))


def assert_equal_to_1e_6(one, two):
    for name, value in learned(one).items():
        found = learned(two)[name]
        if isinstance(value, torch.Tensor | float):
            torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(value), rtol=1e-6, atol=1e-6, msg=name)
        else:
            assert found == value, name


@pytest.mark.slow
def test_ten_times_killed_on_two_processes(tmp_path):
    """The signal reaches one process, any of the two; only the first one writes."""
    places = [place for place in PLACES if place != "saving"]
    two = run(tmp_path / "whole", 2, [])
    assert_equal_to_1e_6(two, run(tmp_path / "fit", 2, plans_of(3, 10, places, ranks=2)))
    plan = {"signal": "SIGKILL", "steps": 5, "place": "saving"}
    assert_equal_to_1e_6(two, run(tmp_path / "saving", 2, [plan]))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_is_told_while_the_initial_sampler_is_scored(tmp_path, rank):
    """Both stop, and the same command starts again."""
    run(tmp_path / "fit", 2, [{"signal": "SIGTERM", "place": "the initial sampler", "rank": rank}])


def test_a_loss_that_is_nan_on_one_of_two_processes(tmp_path):
    """All skip that step (the script compares their samplers at the end)."""
    plan = {"signal": "none", "steps": 4, "place": "the loss is NaN", "rank": 1}
    assert run(tmp_path / "fit", 2, [plan])["num_skipped"] == 1


SAVER = """
    import json, os, signal, sys
    from pathlib import Path

    import torch
    from diffusers import DDPMScheduler

    import ddss_lightning.files as files
    from ddss_lightning import GGDMSampler, NoiseSchedule

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def half(path, data):
        path.open("wb").write(data[: len(data) // 2])
        die()

    def at_call(number):
        calls, replace = [], os.replace
        def function(*paths):
            calls.append(paths)
            die() if len(calls) == number else replace(*paths)
        return function

    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(1000))
    for name, owner, attribute, value in (
        ("half", Path, "write_bytes", half),
        ("before", files.os, "replace", at_call(1)),
        ("between", files.os, "replace", at_call(2)),
    ):
        folder = Path(sys.argv[1], name)
        GGDMSampler(schedule, 3).save_pretrained(folder)
        if not os.fork():
            sampler = GGDMSampler(schedule, 3)
            sampler.corrections["mu"].data += 1e-3
            setattr(owner, attribute, value)
            sampler.save_pretrained(folder, overwrite=True)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
"""


def test_killed_while_it_saves_a_sampler(tmp_path):
    """The old one is there, or what is there says that it is no whole; never the numbers of one with another's card."""
    command = [sys.executable, "-c", textwrap.dedent(SAVER), str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=120)
    for name in ("half", "before"):
        assert (GGDMSampler.from_pretrained(tmp_path / name).corrections["mu"] == 0).all()
    with pytest.raises(
        ValueError, match=r"is damaged: 'sampler.safetensors' and 'sampler.json' do not belong together"
    ):
        GGDMSampler.from_pretrained(tmp_path / "between")
