"""A small host to be patched: plain functions, classes of every sort, dataclasses, specs."""

import dataclasses
import functools


def double(x, *, by=2):
    """Twice x."""
    return x * by


def triple(x):
    return x * 3


def kind_of(tensor_type):
    if tensor_type in ("torch.cuda.FloatTensor", "torch.cuda.HalfTensor"):
        return "cuda"

    def inner():
        return "torch.cuda.FloatTensor"

    return inner()


def decorate(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


@decorate
def decorated(name):
    return name == "nccl"


flag_variable = False
nothing = None
also_nothing = None


class Base:
    def __init__(self, value=1):
        self.value = value

    def forward(self, x):
        return x + self.value

    def only_in_base(self, x):
        return ("base", x, type(self).__name__)

    @staticmethod
    def static(x):
        return x - 1

    @classmethod
    def make(cls, value):
        return cls(value)

    @property
    def size(self):
        """The size."""
        return self.value * 10

    @functools.cached_property
    def cached(self):
        return self.value * 100

    class Inner:
        def ping(self):
            return "pong"


class Child(Base):
    borrowed = Base.forward


class Overriding(Base):
    def forward(self, x):
        return -x


class Single:
    made = None

    def __new__(cls):
        if cls.made is None:
            cls.made = super().__new__(cls)
        return cls.made


@dataclasses.dataclass
class Config:
    hidden: int = 8
    activation: object = triple
    name: str = "toy"

    def __post_init__(self):
        self.checked = True


@dataclasses.dataclass
class SubConfig(Config):
    extra: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.sub_checked = True


@dataclasses.dataclass
class Submodules:
    attention: object = None
    mlp: object = None


@dataclasses.dataclass
class ModuleSpec:
    module: object
    params: dict = dataclasses.field(default_factory=dict)
    submodules: object = None


layer_spec = ModuleSpec(
    module=Base,
    params={"bda": double},
    submodules=Submodules(attention=ModuleSpec(module=Child, params={}), mlp=triple),
)
