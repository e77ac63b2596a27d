"""Multi-latent attention: the host's local spec builds, and every algorithm trains as one process does."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import MLATransformerConfig

from mindspeed.core.context_parallel.layout import SequenceLayout
from mindspeed.host.repairs.latent_attention import head_sizes_of_its_own
from mindspeed.testing import ranks
from mindspeed.testing.parity import assert_same_training
from mindspeed.testing.parity import train as training_record
from tests.core.context_parallel.dense import assert_parity
from tests.core.transformer.attention_of_a_run import HYBRID, RING, ULYSSES, attention_of, layer, plan_arguments, run_of
from tests.training.runs import TINY, assert_same_digits, seed_checkpoint, train

SIZES = "--kv-lora-rank 16 --qk-head-dim 12 --qk-pos-emb-head-dim 8 --v-head-dim 16"
LATENT = f"--multi-latent-attention {SIZES} --position-embedding-type rope"
HYBRID_FLAGS = "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2"


def test_the_hosts_own_attention_equals_ours_and_its_sizes_are_repaired():
    assert_same_training(LATENT, f"{LATENT} --use-flash-attn", features=["flash-attention"])


@pytest.mark.parametrize(
    "more", ["", "--sequence-parallel", "--sequence-parallel --recompute-activations --recompute-modules mla_up_proj"]
)
def test_tensor_parallel_ranks_share_the_gradient_of_what_all_heads_use(more):
    """Plain gradient descent, so that weights show a gradient that misses ranks, or counts them twice."""
    common = (
        f"{LATENT} --q-lora-rank 12 --qk-layernorm --disable-bias-linear --optimizer sgd --sgd-momentum 0 --clip-grad 0 --lr 1"
    )
    one = training_record(common, steps=1)
    two = training_record(f"{common} --tensor-model-parallel-size 2 {more}", world=2, steps=1)
    assert one.weights.keys() == two.weights.keys()
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, rtol=0, atol=3e-6, msg=name)


def test_sizes_of_the_constructor():
    seen = {}

    def original(module, config, *args, softmax_scale=None, **kwargs):
        seen.update(kwargs, scale=softmax_scale)
        module.num_attention_heads_per_partition = 2

    module = SimpleNamespace()
    head_sizes_of_its_own(original, module, None, 1, k_channels=20, v_channels=12, cp_comm_type="p2p")
    assert seen == {"scale": 1 / math.sqrt(20), "cp_comm_type": "p2p"} and module.hidden_size_per_partition == 24
    head_sizes_of_its_own(original, module, None, k_channels=20, v_channels=12, softmax_scale=0.5)
    assert seen["scale"] == 0.5


def assert_sizes(world, algorithm, **more):
    run = run_of(group=world.group, **plan_arguments(algorithm, world.size, **more))
    layout = run.attention.maker.plan.layout(64)
    for value_dim in (8, 24):
        assert_parity(
            attention_of(run, layer(scale=0.21)), layout, world.rank, scale=0.21, dim=12, value_dim=value_dim, groups=4
        )
    run.groups.drop()


@ranks(4)
def test_values_narrower_and_wider_than_keys(world):
    """Row 8 of the defects: the whole sequence is attended to, at the module's scale."""
    for algorithm in (RING, ULYSSES, HYBRID):
        assert_sizes(world, algorithm)
    assert_sizes(world, RING, cp_window_size=2, context_parallel_kv_cache_policy="full")


def test_one_device():
    run = run_of()
    assert_parity(attention_of(run, layer(scale=0.21)), SequenceLayout(33), 0, scale=0.21, dim=12, value_dim=8, groups=4)
    assert run.attention.maker.plan.size == 1 and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "layout", ["--context-parallel-size 4 --cp-window-size 2", f"--context-parallel-size 4 {HYBRID_FLAGS}"]
)
def test_four_ranks_train_as_one(layout):
    yarn = f"{LATENT} --q-lora-rank 16 --rotary-scaling-factor 2.0"
    assert_same_training(yarn, f"{yarn} {layout}", world_b=4, features=["context-parallel"])


@pytest.mark.parametrize(
    "layout",
    [
        "--context-parallel-size 2 --context-parallel-algo ulysses_cp_algo",
        "--context-parallel-size 2 --recompute-granularity selective --recompute-modules core_attn mla_up_proj",
    ],
)
def test_two_ranks_train_as_one(layout):
    assert_same_training(LATENT, f"{LATENT} {layout}", world_b=2, features=["context-parallel"])


@contextlib.contextmanager
def plain_rotary():
    """Rotary positions without YaRN, which no flag of the hosts chooses."""
    original = MLATransformerConfig.__post_init__

    def post_init(config):
        config.rope_type = "rope"
        original(config)

    MLATransformerConfig.__post_init__ = post_init
    try:
        yield
    finally:
        MLATransformerConfig.__post_init__ = original


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Training with the host's own attention on one device."""
    with plain_rotary():
        flags = f"{TINY} {LATENT}"
        flags = f"{flags} {seed_checkpoint(tmp_path_factory.mktemp('latent') / 'seed', flags)}"
        return flags, train(flags).curve


@ranks(2, megatron=True)
@pytest.mark.parametrize("algorithm", ["megatron_cp_algo", "ulysses_cp_algo"])
def test_plain_rotary_positions(world, algorithm, reference):
    flags, expected = reference
    with plain_rotary():
        curve = train(f"{flags} --context-parallel-size 2 --context-parallel-algo {algorithm}").curve
    if world.rank == world.size - 1:
        assert_same_digits(curve, expected)
