"""After revert every attribute of torch and numpy is the object it was, and none is new."""

import sys
import types

import torch
import torch.cuda.nvtx
import torch.distributed.device_mesh
import torch.utils.data.dataloader

from mindspeed.patching.ledger import Ledger
from mindspeed.patching.plan import Plan
from mindspeed.platform.cpu import Cpu
from tests.platform._activated import cpu_activated


def everything():
    """Every attribute of every module and class of torch and numpy, with its object."""
    holders = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("torch", "numpy") and isinstance(module, types.ModuleType):
            holders[name] = module
            for key, value in list(vars(module).items()):
                if issubclass(type(value), type) and getattr(value, "__module__", None) == name:
                    holders[f"{name}:{key}"] = value
    return {(name, key): value for name, holder in holders.items() for key, value in list(vars(holder).items())}


def differences(before, after):
    volatile = ("__abstractmethods__", "_abc_impl", "__warningregistry__", "__weakref__", "__dict__")
    return [key for key in before.keys() | after.keys() if before.get(key) is not after.get(key) and key[1] not in volatile]


def test_revert_leaves_nothing():
    platform, ledger = Cpu(), Ledger()
    list(platform.patches())  # imports what the shims import
    before = everything()
    for _ in range(3):
        platform.activate(ledger)
        assert len(differences(before, everything())) > 150
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        ledger.revert()
        assert differences(before, everything()) == []
    assert len(ledger.rows) == 0


def test_activation_is_idempotent():
    with cpu_activated() as (platform, ledger):
        rows, stream = ledger.rows, torch.cuda.current_stream
        platform.activate(ledger)
        assert ledger.rows == rows and torch.cuda.current_stream is stream


def test_every_row_is_owned_and_explained():
    with cpu_activated() as (_, ledger):
        assert {row.owner for row in ledger.rows} == {"platform.cpu"}
        assert all(row.reason for row in ledger.rows)


def test_planning_while_active_never_stacks_shims_on_shims():
    with cpu_activated() as (platform, _):
        active = torch.cuda.current_device
        for patch in platform.patches():
            if patch.target == "torch.cuda:current_device":
                assert patch.value.__wrapped__ is active.__wrapped__
                break
        else:
            raise AssertionError("torch.cuda.current_device is not patched")


def test_planning_changes_nothing():
    list(Cpu().patches())
    before = everything()
    Plan.of(Cpu().patches())
    assert differences(before, everything()) == []


def test_names_imported_from_torch_are_rebound_in_user_modules():
    user = types.ModuleType("some_users_module")
    exec("from torch.cuda import _lazy_call, current_device as here\nfrom torch.distributed import isend", user.__dict__)
    sys.modules[user.__name__] = user
    originals = dict(vars(user))
    try:
        with cpu_activated():
            ran = []
            user._lazy_call(lambda: ran.append(1))
            assert ran == [1] and user.here() == torch.device("cpu")
            assert user.isend is torch.distributed.isend is torch.distributed.distributed_c10d.isend
        assert all(vars(user)[name] is originals[name] for name in ("_lazy_call", "here", "isend"))
    finally:
        del sys.modules[user.__name__]


def test_caches_of_torch_are_not_filled_with_shims():
    from torch.utils._device import _device_constructors

    with cpu_activated():
        assert torch.empty not in _device_constructors() and torch.empty.__wrapped__ in _device_constructors()
