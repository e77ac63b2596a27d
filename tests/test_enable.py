"""`mindspeed.enable` on the real megatron-core: what it takes, what it refuses, what it leaves behind."""

import argparse
import copy
import dataclasses
import pickle
import sys
import types

import pytest
import torch

import mindspeed
from mindspeed.core.pipeline_parallel.noop_layers import NoopLayers
from mindspeed.patching import Change, Feature, flag, wrap

BLOCK = "megatron.core.transformer.transformer_block:TransformerBlock._build_layers"
CONFIG = "megatron.core.transformer.transformer_config"


@pytest.fixture(autouse=True)
def reverted():
    yield
    mindspeed.revert(force=True)


def transformer_config(**values):
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "use_cpu_initialization": True}
    return TransformerConfig(**{**sizes, **values})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeFlags:
    probe: bool = flag(False, "Look at what happens.")
    probe_depth: int = flag(1, "How closely.")


class Probe(Feature):
    """Look at what happens."""

    flags = ProbeFlags
    seen: list = []

    def normalise(self, flags, run):
        if run.get("hidden_dropout"):
            yield Change("hidden_dropout", 0.0, "--probe wants repeatable numbers")

    def patches(self, flags, host):
        yield wrap("megatron.core.utils:divide", lambda original, *args: original(*args))

    def subscribe(self, flags, host):
        for event in ("groups_created", "groups_destroyed", "model_built", "optimizer_built", "step_begin", "step_end"):
            host.events.on(event, lambda event=event, **details: Probe.seen.append((event, details)))
        host.events.on("log_line", lambda metrics: metrics.update(probe=1))


@pytest.fixture
def every_feature():
    """For tests of what is really there."""


@pytest.fixture(autouse=True)
def probe(request, monkeypatch):
    """Only two features exist: one of ours and one that subscribes to everything; what the latter saw."""
    if "every_feature" not in request.fixturenames:
        features = (NoopLayers(), Probe())
        monkeypatch.setattr("mindspeed.patching.discovery.all_features", lambda package="mindspeed.core": features)
    Probe.seen.clear()
    return Probe.seen


# --- what it takes ----------------------------------------------------------------------------------------


def as_namespace():
    return argparse.Namespace(noop_layers="0", num_layers=4)


def as_object():
    config = transformer_config(num_layers=4)
    config.noop_layers = "0"
    return config


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (None, {"noop_layers": "0", "num_layers": 4}),
        ({"noop-layers": "0", "num-layers": 4}, {}),
        ({"--noop-layers": "0", "num_layers": 4}, {}),
        ({"noop_layers": "1"}, {"num_layers": 4, "noop_layers": "0"}),
    ],
)
def test_every_form_means_the_same(config, flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "--noop-layers", "3", "--optimization-level", "0"])
    handle = mindspeed.enable(config, **flags)
    assert handle.features == ("noop-layers",) and handle.settings.noop_layers == "0" and handle.args.num_layers == 4
    assert any(row.target == BLOCK for row in mindspeed.patches())


def test_namespace_and_config_are_taken():
    with mindspeed.enabled(as_namespace()) as handle:
        assert handle.settings.noop_layers == "0"
    with mindspeed.enabled(transformer_config(num_layers=4), noop_layers="0") as handle:
        assert handle.features == ("noop-layers",) and handle.args.num_layers == 4


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="not int"):
        mindspeed.enable(3)


def test_nothing_is_on_without_flags():
    handle = mindspeed.enable()
    assert handle.features == () and handle.settings is None and not hasattr(transformer_config(), "mindspeed")
    assert {row.owner.partition(".")[0] for row in handle.ledger} == {"platform", "repair", "compat"}


def test_table_is_printed_on_the_first_rank_only(capsys, monkeypatch):
    mindspeed.enable(noop_layers="0", num_layers=4).revert()
    assert "noop-layers" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    mindspeed.enable(noop_layers="0", num_layers=4)
    assert capsys.readouterr().out == ""


# --- what it refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"noop_layer": "0"}, "noop_layer: is not a flag .* did you mean noop_layers"),
        ({"noop_layers": "9", "num_layers": 2}, "outside --num-layers 2"),
        ({"noop_layers": 3, "num_layers": 2}, "--noop-layers 3: cannot be read"),
        ({"noop_layers": "0", "num_layers": 4, "optimization_level": 1}, "needs --optimization-level 2"),
        ({"noop_layers": "0"}, "needs the run's 'num_layers'"),
    ],
)
def test_refusals_change_nothing(flags, words):
    import megatron.core.transformer.transformer_block as block

    before = block.TransformerBlock._build_layers, torch.cuda.current_device
    with pytest.raises(mindspeed.ConfigError, match="(?i)" + words):
        mindspeed.enable(**flags)
    assert mindspeed.patches() == () and (block.TransformerBlock._build_layers, torch.cuda.current_device) == before


def test_refused_namespace_and_config_stay_as_they_were(probe):
    namespace, config = argparse.Namespace(probe="x", num_layers=2, hidden_dropout=0.1), transformer_config(hidden_dropout=0.1)
    before = dict(vars(namespace)), dict(vars(config))
    for given, flags in ((namespace, {}), (config, {"probe": True, "noop_layers": "7"})):
        with pytest.raises(mindspeed.ConfigError):
            mindspeed.enable(given, **flags)
    assert (vars(namespace), vars(config)) == before


def test_only_one_activation_at_a_time():
    with mindspeed.enabled(), pytest.raises(mindspeed.MindspeedError, match="active already .*revert"):
        mindspeed.enable()
    with pytest.raises(mindspeed.MindspeedError, match="not active"):
        mindspeed.runtime()


def test_features_that_add_groups_come_before_groups(probe, monkeypatch):
    import megatron.core.parallel_state as parallel_state

    monkeypatch.setattr(parallel_state, "is_initialized", lambda: True)
    with pytest.raises(mindspeed.ConfigError, match="Call mindspeed.enable before initialize_model_parallel"):
        mindspeed.enable(probe=True)
    assert mindspeed.patches() == ()


# --- what configs carry -----------------------------------------------------------------------------------


def test_configs_carry_settings_through_every_kind_of_copy():
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    @dataclasses.dataclass
    class Users(TransformerConfig):
        extra: int = 3

        def __post_init__(self):
            super().__post_init__()
            self.seen_in_init = self.mindspeed

    handle = mindspeed.enable(noop_layers="0", num_layers=2)
    users = Users(num_layers=2, hidden_size=128, num_attention_heads=4)
    latent = MLATransformerConfig(num_layers=2, hidden_size=128, num_attention_heads=4, multi_latent_attention=True)
    for config in (transformer_config(), users, latent):
        copies = [copy.copy(config), copy.deepcopy(config), dataclasses.replace(config, hidden_dropout=0.0)]
        for one in (config, *copies):
            assert one.mindspeed is handle.settings and one.mindspeed.noop_layers == "0" and type(one) is type(config)
        if config is not users:  # a local class does not pickle, with or without us
            assert pickle.loads(pickle.dumps(config)).mindspeed == handle.settings
    assert users.seen_in_init is handle.settings
    assert "mindspeed" not in {field.name for field in dataclasses.fields(users)}
    handle.revert()
    assert not hasattr(TransformerConfig, "mindspeed") and not hasattr(transformer_config(), "mindspeed")


def test_derived_values_reach_what_was_passed_and_leave_with_revert(probe):
    namespace, config = argparse.Namespace(probe=True, hidden_dropout=0.1), transformer_config(hidden_dropout=0.1)
    with mindspeed.enabled(namespace):
        assert namespace.hidden_dropout == 0.0
        assert namespace.mindspeed.requested["hidden_dropout"] == 0.1
        assert namespace.mindspeed.derived == ["--hidden-dropout: 0.1 -> 0.0 because --probe wants repeatable numbers"]
    assert vars(namespace) == {"probe": True, "hidden_dropout": 0.1}
    with mindspeed.enabled(config, probe=True) as handle:
        assert config.hidden_dropout == 0.0 and config.mindspeed is handle.settings
    assert config.hidden_dropout == 0.1 and not hasattr(config, "mindspeed")


# --- events of a program's own loop -----------------------------------------------------------------------


def test_events_are_fired_by_megatron_core(probe, tmp_path):
    handle = mindspeed.enable(probe=True, probe_depth=2)
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import MegatronModule

    class Line(MegatronModule):
        def __init__(self, config):
            super().__init__(config)
            self.layer = torch.nn.Linear(4, 4)
            self.model_type = ModelType.encoder_or_decoder

        def forward(self, x):
            return self.layer(x)

        def set_input_tensor(self, tensor):
            pass

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        config = transformer_config()
        module = Line(config)
        model = DistributedDataParallel(config, DistributedDataParallelConfig(), module)
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="sgd", lr=0.1), [model])

        def step(iterator, model):
            return model(torch.ones(1, 4)), lambda out: (out.sum(), {"loss": out.sum().detach()})

        for _ in range(2):
            run = {"num_microbatches": 2, "seq_length": 1, "micro_batch_size": 1}
            get_forward_backward_func()(forward_step_func=step, data_iterator=None, model=model, **run)
            get_forward_backward_func()(forward_step_func=step, data_iterator=None, model=model, forward_only=True, **run)
            optimizer.step()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    assert [event for event, _ in probe] == [
        "groups_created",
        "model_built",
        "optimizer_built",
        *["step_begin", "step_end"] * 2,
        "groups_destroyed",
    ]
    details = dict(probe)
    assert details["model_built"] == {"model": [module]} and details["optimizer_built"]["optimizer"] is optimizer
    assert details["step_end"] == {"iteration": 1}
    metrics = {}
    handle.fire("log_line", metrics=metrics)
    assert metrics == {"probe": 1}
    assert handle.ledger.calls("megatron.core.parallel_state:initialize_model_parallel") == 1


def test_events_without_listeners_cost_no_patch():
    handle = mindspeed.enable(noop_layers="0", num_layers=4)
    fired = {row.reason for row in handle.ledger if row.owner == "host.program"}
    assert fired == {"fires checkpoint_save, checkpoint_saved"}  # which no-op layers and manifests wait for


# --- repatch and revert -----------------------------------------------------------------------------------


def test_repatch_changes_flags_and_keeps_the_ground(probe):
    handle = mindspeed.enable(noop_layers="0", num_layers=4, hidden_dropout=0.1)
    ground = [row for row in handle.ledger if row.owner.startswith(("platform.", "repair.", "compat."))]
    mindspeed.repatch({"noop-layers": None, "probe": True})
    assert handle.features == ("probe",) and handle.args.hidden_dropout == 0.0
    mindspeed.repatch({"probe": False, "noop_layers": "1"})
    assert handle.features == ("noop-layers",) and handle.settings.noop_layers == "1"
    assert handle.args.hidden_dropout == 0.1  # what the other feature derived is gone with it
    assert [row for row in handle.ledger if row in ground] == ground
    with pytest.raises(mindspeed.ConfigError):
        mindspeed.repatch({"noop_layers": "9"})
    assert (
        handle.features == ("noop-layers",)
        and handle.args.noop_layers == "1"
        and any(row.target == BLOCK for row in handle.ledger)
    )


def touched_state():
    """Every attribute of loaded torch, numpy and megatron modules and of megatron's classes, by identity."""
    state = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("megatron", "torch", "numpy") and isinstance(module, types.ModuleType):
            for key, value in list(vars(module).items()):
                state[name, key] = value
                if issubclass(type(value), type) and name.startswith(("megatron", "torch.cuda", "torch.nn.modules.module")):
                    state.update({(name, key, item): found for item, found in list(vars(value).items())})
                if type(value) is types.FunctionType and name.startswith("megatron"):
                    state[name, key, "__code__"] = value.__code__
    state.update({("torch.Tensor", key): value for key, value in vars(torch.Tensor).items()})
    return state


@pytest.mark.usefixtures("every_feature")
def test_fifty_rounds_leave_nothing():
    with mindspeed.enabled(noop_layers="0", num_layers=4):
        pass  # imports what there is to import
    before = touched_state()
    for _ in range(50):
        with mindspeed.enabled(noop_layers="0", num_layers=4) as handle:
            assert len(handle.ledger) > 4
    after = touched_state()
    caches = ("__abstractmethods__", "_abc_impl", "__annotations__", "__warningregistry__", "__doc__")
    changed = [key for key in before if after.get(key) is not before[key] and key[-1] not in caches]
    assert changed == [] and [key for key in after if key not in before and key[-1] not in caches] == []


def test_revert_refuses_what_somebody_changed_meanwhile(monkeypatch):
    import megatron.core.transformer.transformer_block as block

    handle = mindspeed.enable(noop_layers="0", num_layers=4)
    ours = block.TransformerBlock._build_layers
    block.TransformerBlock._build_layers = print
    with pytest.raises(mindspeed.LedgerError, match="someone else changed .*_build_layers after us"):
        handle.revert()
    block.TransformerBlock._build_layers = ours
    handle.revert()
    handle.revert()
    assert mindspeed.patches() == ()
