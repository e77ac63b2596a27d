"""The one object that features read from a model's config: `config.mindspeed.noop_layers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mindspeed.patching.patch import Patch, add, wrap

CONFIG = "megatron.core.transformer.transformer_config:TransformerConfig"
OWNER = "host.config"


class Settings:
    """Values of all features' flags, and the names of the features that are on; immutable and hashable.

    `settings.noop_layers` is the value of a flag; `"noop-layers" in settings` says whether a feature is on.
    Copying it gives the object itself; it pickles by value.
    """

    __slots__ = ("_features", "_values")
    _features: tuple[str, ...]
    _values: dict[str, Any]

    def __init__(self, features: Iterable[str], values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_features", tuple(sorted(features)))
        object.__setattr__(self, "_values", {name: _frozen(values[name]) for name in sorted(values)})

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that are on."""
        return self._features

    def __contains__(self, feature: object) -> bool:
        return feature in self._features

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in Settings.__slots__:
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"no feature declares a flag {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"settings of a run do not change: {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"settings of a run do not change: {name} cannot be removed")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and (self._features, self._values) == (other._features, other._values)

    def __hash__(self) -> int:
        return hash((self._features, tuple(self._values.items())))

    def __repr__(self) -> str:
        return f"Settings(on: {', '.join(self._features) or 'nothing'})"

    def __copy__(self) -> Settings:
        return self

    def __deepcopy__(self, memo: Any) -> Settings:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Settings, (self._features, self._values)


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return value


def config_patches(settings: Settings) -> Iterator[Patch]:
    """Give every config of a model its `mindspeed` attribute, subclasses and copies included."""

    def post_init(original: Callable[..., None], config: Any, *args: Any, **kwargs: Any) -> None:
        # Before the original: patches of features around it may ask already.
        object.__setattr__(config, "mindspeed", settings)
        original(config, *args, **kwargs)

    reason = "features read their flags from config.mindspeed"
    yield _owned(wrap(f"{CONFIG}.__post_init__", post_init, reason=reason))
    yield _owned(add(f"{CONFIG}.mindspeed", settings, reason=reason))


def _owned(patch: Patch) -> Patch:
    return dataclasses.replace(patch, owner=OWNER)
