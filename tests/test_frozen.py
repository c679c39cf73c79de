import torch
from torch import nn

from ddss_lightning.frozen import Frozen


class Small(Frozen):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.5)


def test_a_frozen_module_never_leaves_evaluation_mode():
    network = Small()
    assert network.train().training
    network.freeze().train()
    outer = nn.Sequential(network).train()
    assert outer.training
    assert not network.training
    assert not network.drop.training
    assert not any(p.requires_grad for p in network.parameters())


def test_fingerprint_is_of_the_numbers():
    assert Small(0).fingerprint() == Small(0).fingerprint()
    assert Small(0).fingerprint() != Small(1).fingerprint()
    changed = Small(0)
    with torch.no_grad():
        changed.layer.bias[0] += 1e-7
    assert changed.fingerprint() != Small(0).fingerprint()


def test_it_is_not_computed_again_without_need(monkeypatch):
    network, computed = Small(0), []
    monkeypatch.setattr(Small, "_digest", lambda self: computed.append(1) or str(len(computed)))
    assert [network.fingerprint(), network.fingerprint()] == ["1", "1"]
    with torch.no_grad():
        network.layer.bias += 1
    assert network.fingerprint() == "2"
    network.layer.weight = nn.Parameter(torch.zeros(2, 2))
    assert network.fingerprint() == "3"
    network.layer.weight.data = torch.ones(2, 2)
    assert network.fingerprint() == "4"
    network.load_state_dict(Small(1).state_dict())
    assert network.fingerprint() == "5"
    assert network.double().fingerprint() == "6"
    assert network.fingerprint() == "6"


def test_a_network_in_float64_is_the_same_network():
    """A Trainer of precision 64-true casts it, after a checkpoint was looked at and before the next is written."""
    assert Small(0).double().fingerprint() == Small(0).fingerprint()
    assert Small(0).half().fingerprint() != Small(0).fingerprint()
