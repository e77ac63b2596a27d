import dataclasses
import sys
import types

import pytest

from mindspeed.patching.ledger import Ledger
from mindspeed.patching.plan import Plan

TOY = "tests.patching.toy"


def state_of(module):
    """Every attribute of a module and of its classes, functions' code and defaults included, by identity."""
    state = {}
    for name, value in vars(module).items():
        state[name] = value
        if isinstance(value, type) and value.__module__ == module.__name__:
            state.update({f"{name}.{key}": item for key, item in vars(value).items() if key not in ("__dict__", "__weakref__")})
        if isinstance(value, types.FunctionType):
            state[f"{name}.__code__"] = value.__code__
            state[f"{name}.__defaults__"] = value.__defaults__
    return state


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    changed = [name for name in before if before[name] is not after[name]]
    assert changed == []


@pytest.fixture
def toy():
    """The toy host; the test fails if it is not left as it was found."""
    import tests.patching.toy as module

    before = state_of(module)
    fields = {name: field.default for name, field in module.Config.__dataclass_fields__.items()}
    yield module
    assert_same_state(before, state_of(module))
    assert {name: field.default for name, field in module.Config.__dataclass_fields__.items()} == fields
    assert module.Config() == module.Config(8, fields["activation"], "toy")


@pytest.fixture
def ledger():
    """A ledger that is reverted at the end, with force if need be."""
    made = Ledger()
    yield made
    made.revert(force=True)


@pytest.fixture
def user_module(toy):
    """A module of the user that knows the toy's functions under other names."""
    module = types.ModuleType("a_users_module")
    module.twice, module.Parent, module.unrelated = toy.double, toy.Base, None
    exec("class Mine:\n    helper = twice\n    def run(self, x, act=twice):\n        return act(x)\n", vars(module))
    sys.modules["a_users_module"] = module
    yield module
    del sys.modules["a_users_module"]


def owned(patch, owner="a", flag=""):
    return dataclasses.replace(patch, owner=owner, flag=flag)


def plus_one(original, *args, **kwargs):
    return original(*args, **kwargs) + 1


def times_ten(original, *args, **kwargs):
    return original(*args, **kwargs) * 10


def halve(x, *, by=2):
    return x / by


def apply(ledger, *patches):
    Plan.of([patch if patch.owner else owned(patch) for patch in patches]).apply(ledger)
