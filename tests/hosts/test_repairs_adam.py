"""Our Adam in place of the fused ones: the numbers of torch's, and a state that both can load."""

import copy
import pickle

import pytest
import torch

from mindspeed.host.repairs import adam


def steps_of(make, count, *, state=None):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 2))
    groups = [
        {"params": list(model[0].parameters()), "weight_decay": 0.1, "lr": 1e-2},
        {"params": list(model[1].parameters()), "weight_decay": 0.0, "lr": 1e-3},
    ]
    optimizer = make(groups, betas=(0.8, 0.95), eps=1e-7)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(3, 5, generator=torch.Generator().manual_seed(3))).square().sum().backward()
        optimizer.step()
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()}), optimizer


def test_adam_equals_torch_s_bit_for_bit_and_counts_per_group():
    ours, optimizer = steps_of(adam.Adam, 5)
    theirs, _ = steps_of(torch.optim.AdamW, 5)
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    assert [group["step"] for group in optimizer.param_groups] == [5, 5]
    assert all(set(entry) == {"exp_avg", "exp_avg_sq"} for entry in optimizer.state.values())
    for index, entry in theirs["optimizer"]["state"].items():
        assert set(ours["optimizer"]["state"][index]) == set(entry)
        assert all(torch.equal(ours["optimizer"]["state"][index][name], value) for name, value in entry.items())


@pytest.mark.parametrize("saver", [adam.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("loader", [adam.Adam, torch.optim.AdamW])
def test_state_moves_between_both_optimizers(saver, loader):
    whole, _ = steps_of(torch.optim.AdamW, 6)
    half, _ = steps_of(saver, 3)
    rest, _ = steps_of(loader, 3, state=half)
    assert all(torch.equal(rest["model"][name], whole["model"][name]) for name in whole["model"])


def test_group_step_alone_is_enough_as_the_distributed_optimizer_stores_it():
    half, _ = steps_of(adam.Adam, 3)
    for entry in half["optimizer"]["state"].values():
        del entry["step"]
    for group in half["optimizer"]["param_groups"]:
        group["step"] = float(group["step"])  # plain megatron-core writes a float
    rest, optimizer = steps_of(adam.Adam, 3, state=half)
    whole, _ = steps_of(torch.optim.AdamW, 6)
    assert all(torch.equal(rest["model"][name], whole["model"][name]) for name in whole["model"])
    assert [group["step"] for group in optimizer.param_groups] == [6, 6]


def test_adam_survives_copies_pickles_missing_gradients_and_closures():
    _, optimizer = steps_of(adam.Adam, 2)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [group["step"] for group in twin.param_groups] == [2, 2]
    parameter = torch.nn.Parameter(torch.ones(2))
    lonely = adam.Adam([parameter], amsgrad=True)
    lonely.step()
    assert torch.equal(parameter, torch.ones(2)) and lonely.param_groups[0]["step"] == 1

    def closure():
        lonely.zero_grad()
        loss = parameter.sum()
        loss.backward()
        return loss

    assert float(lonely.step(closure).detach()) == 2.0
    assert "max_exp_avg_sq" in lonely.state[parameter]
