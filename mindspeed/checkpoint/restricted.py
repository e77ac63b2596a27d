"""Loading checkpoints of strangers: an unpickler that knows the classes a checkpoint needs and no others.

Pickle files can name any importable function and have it called. `--ckpt-trusted-load off` reads them with
`RestrictedUnpickler`, through torch's own `pickle_module` argument:

    state = load_restricted(path, map_location="cpu")

or, for a host that calls `torch.load` itself, `wrap("torch:load", restricted_load)`.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import io
import os
import pickle
import sys
import types
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any, BinaryIO

from mindspeed.errors import CheckpointError

# module -> names; everything here builds data and has no other effect.
_ADMITTED: dict[str, frozenset[str]] = {
    "argparse": frozenset({"Namespace"}),
    "types": frozenset({"SimpleNamespace"}),
    "collections": frozenset({"OrderedDict", "defaultdict", "deque", "Counter"}),
    "builtins": frozenset(
        {
            "set",
            "frozenset",
            "slice",
            "complex",
            "bytearray",
            "range",
            "int",
            "float",
            "bool",
            "str",
            "bytes",
            "list",
            "dict",
            "tuple",
        }
    ),
    "_io": frozenset({"BytesIO"}),
    "_codecs": frozenset({"encode"}),
    "copyreg": frozenset({"_reconstructor"}),
    "pathlib": frozenset({"Path", "PosixPath", "PurePosixPath", "PurePath"}),
    "pathlib._local": frozenset({"Path", "PosixPath", "PurePosixPath", "PurePath"}),
    "datetime": frozenset({"datetime", "date", "time", "timedelta", "timezone"}),
    "signal": frozenset({"Signals"}),
    "torch": frozenset({"Size", "Tensor", "device"}),
    "torch.nn.parameter": frozenset({"Parameter"}),
    "torch.storage": frozenset({"UntypedStorage", "TypedStorage", "_load_from_bytes"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch._utils": frozenset(
        {
            "_rebuild_tensor",
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v3",
            "_rebuild_parameter",
            "_rebuild_parameter_with_state",
            "_rebuild_sparse_tensor",
            "_rebuild_qtensor",
            "_rebuild_meta_tensor_no_storage",
            "_rebuild_device_tensor_from_numpy",
            "_rebuild_device_tensor_from_cpu_tensor",
        }
    ),
    "numpy": frozenset({"ndarray", "dtype", "bool_"}),
    "numpy.core.multiarray": frozenset({"_reconstruct", "scalar"}),
    "numpy._core.multiarray": frozenset({"_reconstruct", "scalar"}),
    "numpy._core.numeric": frozenset({"_frombuffer"}),
    "numpy.core.numeric": frozenset({"_frombuffer"}),
}
# `_load_from_bytes` calls torch.load, so it must stay inside the fence.
_SUBSTITUTES: dict[tuple[str, str], str] = {("torch.storage", "_load_from_bytes"): "_storage_from_bytes"}
_MEGATRON = ("megatron.core", "megatron.training")
_RECORDS = (*_MEGATRON, "torch.distributed.checkpoint", "torch.distributed._shard")  # dataclasses and named tuples


class RestrictedUnpickler(pickle.Unpickler):
    """Builds tensors, numpy data, namespaces, plain containers, and enum and dataclass types of torch and Megatron."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function that the file asks for.

        Raises:
            CheckpointError: it is not among those a checkpoint needs.
        """
        # Files of pickle protocol 2, torch's default, use the module names of Python 2.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if substitute := _SUBSTITUTES.get((module, name)):
            return globals()[substitute]
        if name in _ADMITTED.get(module, ()):
            return super().find_class(module, name)
        if _in(module, ("numpy", "torch", *_MEGATRON)) and "." not in name:
            found = _found(module, name)
            if _is_data_type(module, found):
                return found
        raise CheckpointError(
            f"the checkpoint asks for {module}.{name}, which --ckpt-trusted-load off does not admit. "
            "If you trust whoever wrote the file, load it with --ckpt-trusted-load on"
        )


def _in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _found(module: str, name: str) -> Any:
    """Attribute of a module of a known package; only megatron's and torch's may have to be imported for it."""
    try:
        return getattr(sys.modules.get(module) or importlib.import_module(module), name, None)
    except ImportError:
        return None


def _is_data_type(module: str, found: Any) -> bool:
    """Types that hold data: dtypes, numpy scalars, enums, dataclasses, named tuples, torch storages."""
    import torch

    if isinstance(found, torch.dtype | torch.layout | torch.memory_format):
        return True
    if not isinstance(found, type):
        return False
    if _in(module, ("numpy",)):
        import numpy

        return issubclass(found, numpy.generic | numpy.dtype)
    if module == "torch" and found.__name__.endswith("Storage"):
        return True
    home = getattr(found, "__module__", "")  # a module may re-export a type that is not its own
    if issubclass(found, enum.Enum):
        return _in(home, (*_MEGATRON, "torch"))
    return _in(home, _RECORDS) and (dataclasses.is_dataclass(found) or issubclass(found, tuple))


def _storage_from_bytes(content: bytes) -> Any:
    return load_restricted(io.BytesIO(content))


def _load(stream: BinaryIO, **options: Any) -> Any:
    return RestrictedUnpickler(stream, **options).load()


def _loads(content: bytes, **options: Any) -> Any:
    return _load(io.BytesIO(content), **options)


# What torch.load takes for a pickle module: it subclasses `Unpickler` and calls `load` for old files.
restricted_pickle = types.SimpleNamespace(
    __name__="mindspeed.checkpoint.restricted", Unpickler=RestrictedUnpickler, load=_load, loads=_loads
)


def load_restricted(file: Any, **options: Any) -> Any:
    """`torch.load` of anything a Megatron checkpoint contains, and of nothing else.

    Raises:
        CheckpointError: the file names a class outside the list.
    """
    import torch

    return torch.load(file, **{**options, "weights_only": False, "pickle_module": restricted_pickle})


def restricted_load(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Advice around `torch.load`: calls that would unpickle anything are fenced in, those with a fence are left alone."""
    if options.get("weights_only") is False and options.get("pickle_module") is None:
        options["pickle_module"] = restricted_pickle
    return original(*args, **options)


def restricted_metadata(original: Callable[..., Any], reader: Any, *args: Any, **options: Any) -> Any:
    """Advice around `FileSystemReader.read_metadata`, which unpickles the `.metadata` of a distributed checkpoint."""
    with open(os.path.join(reader.path, ".metadata"), "rb") as stream:
        RestrictedUnpickler(stream).load()
    return original(reader, *args, **options)
