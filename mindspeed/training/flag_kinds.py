"""Kinds of rows in the trainer's flag table, and how their text is read."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from mindspeed.patching.flags import FlagSpec


def moe_layer_freq(text: str | int) -> int | list[int]:
    """Read `--moe-layer-freq`: an integer, or a list expression of 0 and 1 with `+` and `*`.

    Raises:
        ValueError: the text is neither.
    """
    if isinstance(text, int) or "[" not in text:
        return int(text)
    return [int(item) for item in _evaluate(ast.parse(text.strip(), mode="eval").body)]


def _evaluate(node: ast.AST) -> Any:
    """Evaluate the arithmetic of lists and integers without `eval`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _evaluate(node.left), _evaluate(node.right)
        return left + right if isinstance(node.op, ast.Add) else left * right
    raise ValueError("only lists of 0 and 1 joined by + and repeated by * are understood")


def value_flag(option: str, kind: Callable[[str], Any], default: Any, help: str, **extra: Any) -> FlagSpec:
    """A row of any kind; the destination is the option's name unless `dest` is given."""
    dest = extra.pop("dest", None) or option.lstrip("-").replace("-", "_")
    return FlagSpec(dest=dest, option=option, kind=kind, default=default, help=help, **extra)


def int_flag(option: str, default: int | list[int] | None, help: str, **extra: Any) -> FlagSpec:
    """A row with an integer value, or several."""
    return value_flag(option, int, default, help, **extra)


def float_flag(option: str, default: float | None, help: str, **extra: Any) -> FlagSpec:
    """A row with a float value."""
    return value_flag(option, float, default, help, **extra)


def str_flag(option: str, default: Any, help: str, **extra: Any) -> FlagSpec:
    """A row with a text value, or several."""
    return value_flag(option, str, default, help, **extra)


def switch_on(option: str, help: str, *, dest: str | None = None, default: bool | None = False) -> FlagSpec:
    """A switch that sets its destination to True."""
    return value_flag(option, bool, default, help, dest=dest, is_switch=True)


def switch_off(option: str, dest: str, help: str) -> FlagSpec:
    """A switch whose destination is True until the switch is given."""
    return value_flag(option, bool, True, help, dest=dest, is_switch=True)
