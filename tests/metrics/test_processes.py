"""One, two and three processes, uneven or empty shares: the same scores."""

import pytest
import torch

from ddss_lightning.metrics import (
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    KernelDistanceSubsets,
    PrecisionRecall,
)

N, D = 61, 5
# Number of processes -> by which of them each sample is scored.
SHARES = {
    "two, uneven": (2, [0] * 44 + [1] * 17),
    "two, the first empty": (2, [1] * N),
    "three, strided": (3, [i % 3 for i in range(N)]),
    "three, one empty": (3, [2 * (i % 2) for i in range(N)]),
}


def features(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N + 10 * seed, D, dtype=torch.float64, generator=generator) + 0.4 * seed


def scores(mine, with_indices=True):
    """Scores of the samples of this process, in batches of 8, and of whatever the others have."""
    real, x = features(1), features(0)
    rank_deficient = torch.randn(D, 3 * D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    metrics = {
        "fid": FrechetDistance(real),
        "fid of rank D": FrechetDistance(real @ rank_deficient),
        "kid": KernelDistance(real),
        "subsets": KernelDistanceSubsets(real, num_subsets=4, subset_size=30),
        "prdc": PrecisionRecall(real, 3),
        "is": InceptionScore(D),
        "is of splits": InceptionScore(D, splits=3),
    }
    for batch in mine.split(8) if len(mine) else ():
        for name, metric in metrics.items():
            samples = x[batch] @ rank_deficient if name == "fid of rank D" else x[batch]
            by_index = name[:3] != "fid" and (with_indices or name == "is of splits")
            metric.update(samples, batch) if by_index else metric.update(samples)
    result = {}
    for name, metric in metrics.items():
        value = metric.compute()
        result |= {f"{name} {key}": v.item() for key, v in (value if isinstance(value, dict) else {"": value}).items()}
        # The process has its own share back, and goes on.
        if name in ("fid", "kid"):
            metric.update(x[:3])
    return result


def work(rank, folder):
    torch.set_num_threads(1)
    for case, (world_size, owners) in enumerate(SHARES.values()):
        if rank < world_size:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/store{case}", rank=rank, world_size=world_size
            )
            mine = torch.nonzero(torch.tensor(owners) == rank).flatten()
            found = [scores(mine, with_indices) for with_indices in (True, False)]
            torch.save(found, f"{folder}/{case}-{rank}.pt")
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    # One process imports, three are forked from it.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(work, (str(folder),), nprocs=3, start_method="forkserver")
    return folder


@pytest.mark.parametrize("case", range(len(SHARES)), ids=list(SHARES))
def test_same_scores_in_any_number_of_processes(case, folder):
    expected = [scores(torch.arange(N), with_indices) for with_indices in (True, False)]
    for rank in range(list(SHARES.values())[case][0]):
        for found, one in zip(torch.load(folder / f"{case}-{rank}.pt"), expected, strict=True):
            assert found == pytest.approx(one, rel=1e-9)


def test_splits_in_several_processes_need_indices(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="give `indices`, the global index of each sample"):
        InceptionScore(D, splits=3).update(features(0))
    InceptionScore(D).update(features(0))
