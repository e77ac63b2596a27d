"""The life of Megatron-LM's arguments with our features in it: parse, validate, apply, then train.

One `ArgumentHooks` object serves a process. Its methods wrap the host's functions of the same purpose; features
are chosen from the arguments that the host itself parsed, never from a second look at the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mindspeed.errors import MindspeedError
from mindspeed.host import megatron_yaml
from mindspeed.host.megatron_defaults import allow_one_connection
from mindspeed.patching import activation
from mindspeed.patching.patch import wrap
from mindspeed.patching.plan import Plan

if TYPE_CHECKING:
    from mindspeed.runtime import Runtime

HOOKS_OWNER = "host.hooks"
_TRAINING = "megatron.training"
_REFUSED = 2  # exit status of a command line that cannot be honoured, as argparse's


class ArgumentHooks:
    """Wraps the functions of the host through which arguments pass, on behalf of one runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._prints_held = 0

    def install(self) -> None:
        """Wrap the host's functions; megatron.training must be importable."""
        hooks: dict[str, Callable[..., Any]] = {
            "arguments:parse_args": self.parse_args,
            "arguments:validate_args": self.validate,
            "arguments:_print_args": self.print_args,
            "yaml_arguments:validate_yaml": self.validate,
            "yaml_arguments:_print_args": self.print_args,
            "initialize:initialize_megatron": self.initialize_megatron,
        }
        reason = "features add flags to the host's parser and act on the arguments that it validated"
        patches = [wrap(f"{_TRAINING}.{name}", advice, reason=reason) for name, advice in hooks.items()]
        Plan.of(dataclasses.replace(patch, owner=HOOKS_OWNER) for patch in patches).apply(self._runtime.ledger)

    def parse_args(
        self,
        original: Callable[..., argparse.Namespace],
        extra_args_provider: Callable[[argparse.ArgumentParser], argparse.ArgumentParser] | None = None,
        ignore_unknown_args: bool = False,
    ) -> argparse.Namespace:
        """Parse with the host's flags, the program's own, and ours, in this order."""
        seen: list[argparse.ArgumentParser] = []

        def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            if extra_args_provider is not None:
                parser = extra_args_provider(parser)
            activation.add_flags(parser, self._runtime.features)
            activation.explain_unknown_flags(parser)
            seen.append(parser)
            return parser

        args = original(provider, ignore_unknown_args)
        given = activation.given_flags(seen[0], sys.argv[1:])
        if getattr(args, "yaml_cfg", None) is not None:
            megatron_yaml.merge(args, seen[0], self._runtime.features, given)
        args.given_flags = tuple(sorted(given))
        return args

    def validate(self, original: Callable[..., Any], args: Any, defaults: dict[str, Any] | None = None) -> Any:
        """Settle derived values, let the host validate, check every rule, apply the features' patches.

        Serves `validate_args` and `validate_yaml` (which returns another namespace). A second validation in a
        process takes the features of the first back.

        Raises:
            ConfigError, TargetError, ConflictError: no feature has changed anything then.
        """
        runtime = self._runtime
        runtime.deactivate()
        allow_one_connection(runtime.platform.name)
        given = frozenset(getattr(args, "given_flags", ()))
        with quiet_unless_first():
            active = runtime.settle(args, given)
        try:
            with self._holding_prints(), activation.overridden(args, active, platform=runtime.platform.name):
                validated = original(args, defaults or {})
        except AssertionError:
            runtime.check(args, given)  # the same rule is ours, too, more often than not, with numbers and a remedy
            raise
        validated.mindspeed = args.mindspeed
        runtime.host.args = validated
        runtime.activate(runtime.check(validated, given))
        self._print(validated)
        return validated

    def initialize_megatron(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let the host start without CUDA, and end with one message when the command line cannot be honoured."""
        if self._runtime.platform.name != "cuda" and len(args) < 4:  # the fourth is allow_no_cuda itself
            kwargs["allow_no_cuda"] = True
        try:
            return original(*args, **kwargs)
        except MindspeedError as error:
            if _rank() == 0:
                print(f"mindspeed: {error}", file=sys.stderr, flush=True)
            raise SystemExit(_REFUSED) from None

    def print_args(self, original: Callable[..., None], title: str, args: argparse.Namespace) -> None:
        """The host prints its table inside validation; ours comes once, when the values are final."""
        if not self._prints_held:
            original(title, args)

    @contextlib.contextmanager
    def _holding_prints(self) -> Iterator[None]:
        self._prints_held += 1
        try:
            yield
        finally:
            self._prints_held -= 1

    def _print(self, args: argparse.Namespace) -> None:
        """Through the host's function, whoever else has wrapped it."""
        arguments: Any = importlib.import_module(f"{_TRAINING}.arguments")
        arguments._print_args("arguments", args)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def quiet_unless_first() -> Iterator[None]:
    """Let the other ranks' lines about derived values stay out of the log: they are the same everywhere."""
    logger = logging.getLogger("mindspeed")
    level = logger.level
    if _rank() != 0:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
