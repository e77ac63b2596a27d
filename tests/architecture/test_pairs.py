"""Two features on one target are either declared apart (`conflicts`) or fit: the order of their patches is declared."""

import argparse
import dataclasses
import functools
import itertools

from mindspeed.host.program import ProgramHost, host_defaults
from mindspeed.patching import wrap
from mindspeed.patching.conflicts import _clash
from mindspeed.patching.discovery import all_features

SIZES = {"num_layers": 8, "hidden_size": 128, "num_attention_heads": 8, "seq_length": 64, "max_position_embeddings": 64}
SIZES |= {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "context_parallel_size": 2, "world_size": 8}
SIZES |= {"micro_batch_size": 1, "global_batch_size": 8, "data_parallel_size": 1, "rank": 0}


class AnyHost(ProgramHost):
    """Knows every logical target under its own name."""

    def target(self, logical):
        return logical

    def load(self, target):
        return None if target.startswith("training:") else super().load(target)


def on(feature):
    """Flags that differ from their defaults."""
    values = {}
    for spec in feature.specs:
        sample = spec.choices[-1] if spec.choices else {int: 1, float: 0.5}.get(spec.kind, "1")
        values[spec.dest] = (not spec.default) if spec.is_switch else (sample,) if spec.is_many else sample
    return feature.flags(**values)


@functools.cache
def patches():
    """Feature -> its patches by target, as far as they can be listed with sample flags."""
    listed = {}
    for feature in all_features():
        flags = on(feature)
        args = argparse.Namespace(**{**host_defaults(), **SIZES, **vars(flags)})
        try:
            found = [dataclasses.replace(patch, owner=feature.name) for patch in feature.patches(flags, AnyHost(args))]
        except (ValueError, TypeError, AttributeError, KeyError):  # the samples do not suit it; its own tests list them
            continue
        listed[feature] = found
    return listed


def test_most_features_can_be_listed():
    assert len(patches()) >= 0.7 * len(all_features())


def clashes_of(one, other):
    if other.name in one.conflicts or one.name in other.conflicts:
        return []
    return [
        clash
        for first, second in itertools.product(patches().get(one, ()), patches().get(other, ()))
        if first.target.replace(":", ".") == second.target.replace(":", ".")
        and {first.owner, second.owner}.isdisjoint({*first.supersedes, *second.supersedes})
        and (clash := _clash(first, second, first.target))
    ]


def test_every_pair_fits_or_is_declared_apart():
    assert [clash for pair in itertools.combinations(all_features(), 2) for clash in clashes_of(*pair)] == []


def test_a_clash_would_be_seen(monkeypatch):
    one, other = all_features()[:2]
    wraps = {feature: [dataclasses.replace(wrap("a.b:c", print), owner=feature.name)] for feature in (one, other)}
    monkeypatch.setitem(globals(), "patches", lambda: wraps)
    monkeypatch.setattr(type(one), "conflicts", {})
    monkeypatch.setattr(type(other), "conflicts", {})
    assert len(clashes_of(one, other)) == 1
