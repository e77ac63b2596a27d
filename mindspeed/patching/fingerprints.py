"""Noticing that the host's code is not the code our patches were written for.

`host_fingerprints.json` holds, for every function and class that training uses, a hash of
the signature and one of the body as they are in the supported version (docstrings, annotations and layout
left out). A changed signature is an error; a changed body is one warning, since researchers edit their host,
or an error with MINDSPEED_STRICT_HOST=1.

`python -m mindspeed.patching.fingerprints --record` writes the file anew from the installed host.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed.errors import TargetError
from mindspeed.patching.callables import original_of
from mindspeed.patching.resolve import Resolved

_log = logging.getLogger(__name__)
TABLE = Path(__file__).with_name("host_fingerprints.json")
STRICT = "MINDSPEED_STRICT_HOST"
_PACKAGES = ("megatron.core", "megatron.training", "megatron.legacy.fused_kernels")
_LEFT_OUT = tuple(
    "inference export ssm tokenizers models/retro models/vision models/bert models/T5 models/multimodal models/mamba "
    "models/huggingface models/mimo datasets/retro datasets/bert datasets/t5 datasets/masked datasets/multimodal".split()
)
_RECORD = "python -m mindspeed.patching.fingerprints --record"
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of a definition; equal signature and other body is the mild case."""

    signature: str
    body: str

    def __str__(self) -> str:
        return f"{self.signature}:{self.body}"

    @classmethod
    def read(cls, text: str) -> Fingerprint:
        """From the form in the table."""
        signature, _, body = text.partition(":")
        return cls(signature, body)


def fingerprint(node: _Definition) -> Fingerprint:
    """Hashes of a definition in source code."""
    signature: Any = node.bases if isinstance(node, ast.ClassDef) else node.args
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return Fingerprint(_digest([signature]), _digest([*node.decorator_list, *body]))


def _digest(nodes: Iterable[ast.AST]) -> str:
    return hashlib.sha256("\n".join(_canonical(node) for node in nodes).encode()).hexdigest()[:12]


def _canonical(node: Any) -> str:
    """Text of a syntax tree that does not depend on the Python version, docstrings, annotations or layout."""
    if isinstance(node, list):
        return "[" + ",".join(map(_canonical, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.AnnAssign):
        return f"Assign({_canonical(node.target)},{_canonical(node.value)})"
    fields = dict(ast.iter_fields(node))
    for left_out in ("annotation", "returns", "ctx", "kind", "type_comment", "type_params"):
        fields.pop(left_out, None)
    if isinstance(node, _Definition) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    parts = (f"{name}={_canonical(value)}" for name, value in fields.items() if value not in (None, []))
    return f"{type(node).__name__}({','.join(parts)})"


@functools.lru_cache(maxsize=4096)
def of_object(value: Any) -> Fingerprint | None:
    """Fingerprint of a function or class in memory; None where its source is not at hand."""
    try:
        source = inspect.getsource(value)
        # Not dedented: that would change the text of strings that span lines.
        node: Any = ast.parse(source).body[0] if not source[:1].isspace() else _parse(f"if 1:\n{source}").body[0].body[0]
    except (OSError, TypeError, SyntaxError, IndexError, AttributeError):
        return None
    return fingerprint(node) if isinstance(node, _Definition) else None


def _parse(source: str) -> Any:
    return ast.parse(source)


def of_source(source: str) -> dict[str, Fingerprint]:
    """Fingerprints of every function and class of a module, by qualified name."""
    return dict(_definitions(ast.parse(source).body, ""))


def _definitions(body: Iterable[ast.stmt], prefix: str) -> Iterator[tuple[str, Fingerprint]]:
    for node in body:
        if isinstance(node, _Definition):
            yield prefix + node.name, fingerprint(node)
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.If, ast.Try)):  # alternatives: the last definition would win at run time, too
            for branch in ("body", "handlers", "orelse", "finalbody"):
                for part in getattr(node, branch, []):
                    yield from _definitions(part.body if isinstance(part, ast.ExceptHandler) else [part], prefix)


@functools.cache
def recorded() -> dict[str, dict[str, str]]:
    """Module -> qualified name -> fingerprint in the supported version."""
    if not TABLE.exists():
        return {}
    modules: dict[str, dict[str, str]] = json.loads(TABLE.read_text(encoding="utf-8"))["modules"]
    return modules


@dataclass(frozen=True)
class Drift:
    """A target that is not what was recorded."""

    target: str
    in_signature: bool
    now: str

    def __str__(self) -> str:
        return f"{self.target} has another signature: {self.now}" if self.in_signature else f"{self.target} has another body"


def drift_of(found: Resolved) -> Drift | None:
    """How a target differs from the supported version; None where it does not or nothing was recorded."""
    value = inspect.unwrap(original_of(found.value)) if callable(original_of(found.value)) else None
    name = getattr(value, "__qualname__", "")
    expected = recorded().get(getattr(value, "__module__", None) or "", {}).get(name)
    if expected is None or not isinstance(value, type) and not inspect.isfunction(value):
        return None
    present = of_object(value)
    if present is None:
        _log.debug("no source of %s: its body cannot be compared with the supported version", found.target)
        return None
    wanted = Fingerprint.read(expected)
    if present == wanted:
        return None
    in_signature = present.signature != wanted.signature
    return Drift(found.target, in_signature, f"{value.__qualname__}{_signature(value)}" if in_signature else "")


def known(found: Resolved) -> str:
    """Fingerprint of a target as it is now, for the ledger; empty for what is not in the table."""
    value = inspect.unwrap(original_of(found.value)) if callable(original_of(found.value)) else None
    if getattr(value, "__qualname__", "") not in recorded().get(getattr(value, "__module__", None) or "", {}):
        return ""
    return str(of_object(value) or "")


def _signature(value: Any) -> str:
    try:
        return str(inspect.signature(value))
    except (TypeError, ValueError):
        return "(...)"


def report(drifts: Iterable[tuple[str, Drift]], supported: str) -> list[str]:
    """Lines of an error for what cannot be accepted; the rest is one warning.

    Args:
        drifts: (who patches, what differs).
        supported: versions, for the message.
    """
    drifts = list(dict.fromkeys(drifts))
    strict = os.environ.get(STRICT, "0") not in ("", "0")
    fatal = [f"{who}: {drift}" for who, drift in drifts if drift.in_signature or strict]
    mild = [drift.target for _, drift in drifts if not drift.in_signature]
    if mild and not strict:
        _log.warning(
            "the host's code differs from the supported version (%s) in what these patches assume: %s. "
            "If you edited it on purpose, check that the features still do what you want; %s=1 makes this an error.",
            supported,
            ", ".join(dict.fromkeys(mild)),
            STRICT,
        )
    return fatal


def covered_modules() -> Iterator[tuple[str, Path]]:
    """Modules of the host that training uses, with their files; new patches find their targets in the table already."""
    for package in _PACKAGES:
        init = _source_path(package)
        if init is None:
            continue
        for path in init.parent.rglob("*.py"):
            below = path.relative_to(init.parent).as_posix()
            if not below.startswith(_LEFT_OUT):
                name = f"{package}.{below.removesuffix('.py').replace('/', '.')}"
                yield name.removesuffix(".__init__"), path


def _source_path(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, AttributeError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def record() -> dict[str, Any]:
    """The table for the installed host; modules that are not installed keep their present entries."""
    table: dict[str, dict[str, str]] = dict(recorded())
    for module, path in covered_modules():
        prints = of_source(path.read_text(encoding="utf-8"))
        table[module] = {name: str(prints[name]) for name in sorted(prints)}
    return {"host": "megatron-core 0.12.1", "modules": {name: table[name] for name in sorted(table) if table[name]}}


def verify(steps: Iterable[tuple[str, Resolved]], supported: str) -> None:
    """Compare targets with the recorded ones.

    Args:
        steps: (who patches, target).

    Raises:
        TargetError: a signature differs, or anything with MINDSPEED_STRICT_HOST=1.
    """
    drifts = [(who, drift) for who, found in steps if (drift := drift_of(found)) is not None]
    if fatal := report(drifts, supported):
        raise TargetError("\n".join([*fatal, f"Supported: {supported}."]))


def main(arguments: list[str]) -> int:
    """Write or check the table."""
    if arguments == ["--record"]:
        TABLE.write_text(json.dumps(record(), indent=0) + "\n", encoding="utf-8")
        print(f"recorded {sum(map(len, record()['modules'].values()))} definitions in {TABLE.name}")
        return 0
    print(f"usage: {_RECORD}")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
