"""What context parallelism cannot honour is refused from the command line, before any process group exists.

Each row is a command line of the trainer and the words of its refusal; the rules themselves have tests beside their features.
"""

import pytest
import torch

import mindspeed
from mindspeed.core.transformer.flash_attention.generate_mask.generate_mask import STORE, set_attention_mask
from mindspeed.errors import ConfigError
from mindspeed.notices import log_once, warn_once
from mindspeed.training.initialize import settle_arguments
from tests.training.runs import TINY

SMALL = f"{TINY} --num-layers 4 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64"
FOUR = "--context-parallel-size 4"
ULYSSES, HYBRID = f"{FOUR} --context-parallel-algo ulysses_cp_algo", f"{FOUR} --context-parallel-algo hybrid_cp_algo"
GATHER, ADAPTIVE = f"{FOUR} --context-parallel-algo kvallgather_cp_algo", f"{FOUR} --context-parallel-algo adaptive_cp_algo"
BOTH = f"{FOUR} --context-parallel-algo hybrid_adaptive_cp_algo --ulysses-degree-in-cp 2"
GQA = "--group-query-attention --num-query-groups"
ALIBI = "--position-embedding-type alibi"
DOCUMENTS = "--reset-attention-mask"
POLICY = "--context-parallel-kv-cache-policy full"

REFUSED = {
    "level": (f"{FOUR} --optimization-level 1", "--context-parallel-size 4: needs --optimization-level 2 (given 1)"),
    "length of a ring": (f"{FOUR} --seq-length 60", "--seq-length 60: must be a multiple of 2 x --context-parallel-size = 8 for megatron"),
    "length of a hybrid": (f"{HYBRID} --ulysses-degree-in-cp 2 --seq-length 60", "--seq-length 60: must be a multiple of 2 x --context-parallel-size = 8 for hybrid"),
    "length of gathered keys": (f"{GATHER} --seq-length 60", "--seq-length 60: must be a multiple of 2 x --context-parallel-size = 8 for kvallgather"),
    "length with documents": (f"{FOUR} --attention-mask-type general {DOCUMENTS} --seq-length 60", "--seq-length 60: must be a multiple of 2 x --context-parallel-size = 8 for megatron"),
    "length of Ulysses": (f"{ULYSSES} --seq-length 62", "--seq-length 62: must be a multiple of --context-parallel-size = 4 for ulysses"),
    "length of plain blocks": (f"{FOUR} --attention-mask-type general --seq-length 62", "--seq-length 62: must be a multiple of --context-parallel-size = 4 for megatron"),
    "length of adaptive": (f"{ADAPTIVE} --seq-length 62", "--seq-length 62: must be a multiple of --context-parallel-size = 4 for adaptive"),
    "heads of Ulysses": (f"{ULYSSES} --num-attention-heads 6 --kv-channels 16", "--num-attention-heads 6: must be divisible by --context-parallel-size 4 x --tensor-model-parallel-size 1 for ulysses_cp_algo. Usable sizes: 2, 3, 6"),
    "heads of a hybrid": (f"{HYBRID} --ulysses-degree-in-cp 2 --num-attention-heads 5 --kv-channels 16", "--num-attention-heads 5: must be divisible by --ulysses-degree-in-cp 2 x --tensor-model-parallel-size 1"),
    "heads of both": (f"{BOTH} --num-attention-heads 5 --kv-channels 16", "--num-attention-heads 5: must be divisible by --ulysses-degree-in-cp 2"),
    "groups and heads": (f"{FOUR} {GQA} 3", "--num-query-groups 3: must divide --num-attention-heads 8"),
    "groups and ranks": (f"--context-parallel-size 2 --tensor-model-parallel-size 2 {GQA} 1", "--num-query-groups 1: must be a multiple of --tensor-model-parallel-size 2"),
    "degree missing": (HYBRID, "--ulysses-degree-in-cp: is required by hybrid_cp_algo. Use 2"),
    "degree uneven": (f"{HYBRID} --ulysses-degree-in-cp 3", "--ulysses-degree-in-cp 3: must divide --context-parallel-size 4. Use 2"),
    "degree whole": (f"{HYBRID} --ulysses-degree-in-cp 4", "--ulysses-degree-in-cp 4: equals --context-parallel-size 4: no ring is left for hybrid_cp_algo. Use --context-parallel-algo ulysses_cp_algo"),
    "degree beyond": (f"{HYBRID} --ulysses-degree-in-cp 8", "--ulysses-degree-in-cp 8: must divide --context-parallel-size 4"),
    "degree zero": (f"{HYBRID} --ulysses-degree-in-cp 0", "--ulysses-degree-in-cp 0: must be at least 1"),
    "window uneven": (f"{FOUR} --cp-window-size 3", "--cp-window-size 3: must be smaller than, and divide, the ring of 4 ranks. Use 2"),
    "window whole": (f"{FOUR} --cp-window-size 4", "--cp-window-size 4: must be smaller than, and divide, the ring of 4 ranks. Use 2"),
    "window zero": (f"{FOUR} --cp-window-size 0", "--cp-window-size 0: must be at least 1"),
    "window of a hybrid": (f"{HYBRID} --ulysses-degree-in-cp 2 --cp-window-size 2", "--cp-window-size 2: must be smaller than, and divide, the ring of 2 ranks"),
    "ALiBi type": (f"{ALIBI} --alibi-fusion-attn-type 1", "--alibi-fusion-attn-type 1: is no ALiBi type. Use 0, 2 or 3"),
    "ALiBi adaptive": (f"{ADAPTIVE} {ALIBI}", "--position-embedding-type alibi: does not work with adaptive_cp_algo"),
    "ALiBi both": (f"{BOTH} {ALIBI}", "--position-embedding-type alibi: does not work with hybrid_adaptive_cp_algo"),
    "ALiBi general": (f"{FOUR} --attention-mask-type general {ALIBI}", "--position-embedding-type alibi: needs --attention-mask-type causal"),
    "ALiBi sign": (f"{ALIBI} --alibi-fusion-attn-type 2 --alibi-diagonal-opposite", "--alibi-diagonal-opposite: needs --alibi-fusion-attn-type 0 (given 2)"),
    "documents adaptive": (f"{ADAPTIVE} {DOCUMENTS}", "--reset-attention-mask: does not work with adaptive_cp_algo"),
    "documents both": (f"{BOTH} {DOCUMENTS}", "--reset-attention-mask: does not work with hybrid_adaptive_cp_algo"),
    "policy alone": (POLICY, "--context-parallel-kv-cache-policy full: needs --context-parallel-size above 1"),
    "policy adaptive": (f"{ADAPTIVE} {POLICY}", "--context-parallel-kv-cache-policy full: does not work with adaptive_cp_algo"),
    "policy both": (f"{BOTH} {POLICY}", "--context-parallel-kv-cache-policy full: does not work with hybrid_adaptive_cp_algo"),
    "policy gathered": (f"{GATHER} {POLICY}", "--context-parallel-kv-cache-policy full: does not work with kvallgather_cp_algo"),
    "policy useless": (f"{ULYSSES} {POLICY} {GQA} 4", "--context-parallel-kv-cache-policy full: saves nothing: 4 key heads per rank need no repetition over 4 ranks"),
    "interval alone": (f"{FOUR} --context-parallel-cache-interval 1", "--context-parallel-cache-interval 1: needs a cache policy"),
    "interval below": (f"{FOUR} {POLICY} --context-parallel-cache-interval -1", "--context-parallel-cache-interval -1: must be at least 0"),
    "interval beyond": (f"{FOUR} {POLICY} --context-parallel-cache-interval 4", "--context-parallel-cache-interval 4: must be smaller than --num-layers 4. Use 0 to 3"),
    "gathered alone": (f"--use-ulysses-allgather-kv {GQA} 1", "--use-ulysses-allgather-kv: needs --context-parallel-size above 1"),
    "gathered ring": (f"{FOUR} --use-ulysses-allgather-kv {GQA} 1", "--use-ulysses-allgather-kv: needs --context-parallel-algo ulysses_cp_algo (given megatron_cp_algo)"),
    "gathered heads": (f"{ULYSSES} --use-ulysses-allgather-kv", "--use-ulysses-allgather-kv: needs --group-query-attention"),
    "gathered groups": (f"{ULYSSES} --use-ulysses-allgather-kv {GQA} 2", "--use-ulysses-allgather-kv: needs one key head per tensor-parallel rank, there are 2"),
    "internal mode": ("--use-flash-attn --sparse-mode 5", "--sparse-mode 5: 5 to 8 are internal modes"),
    "empty band": ("--use-flash-attn --sparse-mode 4 --pre-tockens 1 --next-tockens -2", "--pre-tockens 1: with --next-tockens -2 rows would see no key"),
    "band without kernels": ("--pre-tockens 8", "--pre-tockens 8: needs flash attention. Add --use-flash-attn at --optimization-level 2, or remove it"),
    "future without kernels": ("--next-tockens 8", "--next-tockens 8: needs flash attention. Add --use-flash-attn at --optimization-level 2, or remove it"),
    "mode without kernels": ("--sparse-mode 4", "--sparse-mode 4: needs flash attention. Add --use-flash-attn at --optimization-level 2, or remove it"),
    "more tokens": (f"{FOUR} --mtp-num-layers 1 --position-embedding-type rope", "--mtp-num-layers 1: does not work with context parallelism"),
    "contradiction": (f"{ULYSSES} --cp-comm-type p2p", "--cp-comm-type p2p: contradicts --context-parallel-algo ulysses_cp_algo"),
    "types per layer": (f"{FOUR} --cp-comm-type p2p a2a a2a a2a", "--cp-comm-type a2a, p2p: different types per layer"),
    "no type": (f"{FOUR} --cp-comm-type ring", "--cp-comm-type ring: is not a type. Use one of p2p, a2a, allgather, a2a+p2p"),
    "sizes of groups": (f"{FOUR} --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 3", "--hierarchical-context-parallel-sizes 2 3: have the product 6, not --context-parallel-size 4"),
    "sizes alone": ("--hierarchical-context-parallel-sizes 2 2", "--hierarchical-context-parallel-sizes 2 2: have the product 4, not --context-parallel-size 1"),
    "sizes and degree": (f"{HYBRID} --ulysses-degree-in-cp 2 --hierarchical-context-parallel-sizes 4 1", "--hierarchical-context-parallel-sizes 4 1: are not those of --ulysses-degree-in-cp 2 and its rings. Give 2 2"),
    "adaptive alone": ("--context-parallel-algo adaptive_cp_algo --adaptive-cp-only-reschedule", "--adaptive-cp-only-reschedule: needs the feature context-parallel, which is off. Give --context-parallel-size above 1"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch):
    """As one of four ranks that has met nobody yet."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    yield
    STORE.end_run()
    mindspeed.revert(force=True)


def refusal(flags):
    with pytest.raises(ConfigError) as caught:
        settle_arguments(argv=f"{SMALL} {flags}".split())
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_group_exists(name):
    flags, words = REFUSED[name]
    found = refusal(flags)
    assert any(problem.startswith(words) for problem in found), found
    assert not torch.distributed.is_initialized() and mindspeed.patches() == ()


def test_a_mask_beside_documents_is_refused():
    set_attention_mask(torch.zeros(64, 64, dtype=torch.bool))
    (problem,) = refusal(f"{FOUR} {DOCUMENTS}")
    assert problem.startswith("--reset-attention-mask: a mask is set with set_attention_mask too")


def test_everything_is_told_at_once():
    found = refusal(f"{ULYSSES} --num-attention-heads 6 --kv-channels 16 --seq-length 62 --context-parallel-cache-interval 1")
    starts = ("--seq-length 62: ", "--num-attention-heads 6: ", "--context-parallel-cache-interval 1: ")
    assert all(any(problem.startswith(start) for problem in found) for start in starts), found


ACCEPTED = {
    "documents in Ulysses": f"{ULYSSES} {DOCUMENTS}",
    "documents in a hybrid": f"{HYBRID} --ulysses-degree-in-cp 2 {DOCUMENTS}",
    "documents general": f"{FOUR} --attention-mask-type general {DOCUMENTS}",
    "ALiBi": f"{FOUR} {ALIBI} --cp-window-size 2 {DOCUMENTS} --attention-dropout 0.1",
    "gathered without policy": f"{ULYSSES} --use-ulysses-allgather-kv {GQA} 1",
    "deterministic": f"{FOUR} --deterministic-mode",
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    args = settle_arguments(argv=f"{SMALL} {ACCEPTED[name]}".split()).args
    assert args.context_parallel_size == 4 and (args.alibi_fusion_attn_type == 2) == (name == "ALiBi")


HINTS = {
    "degree": (f"{FOUR} --ulysses-degree-in-cp 2", "--ulysses-degree-in-cp has no effect with megatron_cp_algo"),
    "degree of one": (f"{HYBRID} --ulysses-degree-in-cp 1", "--ulysses-degree-in-cp 1: hybrid_cp_algo is the same without Ulysses"),
    "window Ulysses": (f"{ULYSSES} --cp-window-size 2", "--cp-window-size has no effect with ulysses_cp_algo"),
    "window adaptive": (f"{ADAPTIVE} --cp-window-size 2", "--cp-window-size has no effect with adaptive_cp_algo"),
    "window gathered": (f"{GATHER} --cp-window-size 2", "--cp-window-size has no effect with kvallgather_cp_algo"),
    "window alone": ("--cp-window-size 2", "--cp-window-size 2 has no effect because the feature context-parallel is off"),
    "algorithm alone": ("--context-parallel-algo ulysses_cp_algo", "--context-parallel-algo ulysses_cp_algo has no effect because"),
    "order": ("--shape-order SBH", "--shape-order is accepted for old scripts and has no effect"),
    "layout": (f"{FOUR} --megatron-cp-in-bnsd", "--megatron-cp-in-bnsd concerns the NPU kernel; nothing changes on cpu"),
    "band": ("--use-flash-attn --sparse-mode 2 --pre-tockens 8", "--pre-tockens ignored: --sparse-mode 2 has no band"),
    "ALiBi": (f"{ALIBI} --square-alibi-mask", "--square-alibi-mask and --fill-neg-inf change nothing"),
    "mode alone": ("--sparse-mode 2 --pre-tockens 65536", "--sparse-mode 2 has no effect because the feature flash-attention is off"),
    "ALiBi alone": ("--alibi-fusion-attn-type 2", "--alibi-fusion-attn-type 2 has no effect because the feature alibi is off"),
}  # fmt: skip


@pytest.mark.parametrize("name", HINTS)
def test_what_means_nothing_is_named_once(name, caplog):
    warn_once.cache_clear()
    log_once.cache_clear()
    flags, words = HINTS[name]
    with caplog.at_level("INFO", logger="mindspeed"):
        settle_arguments(argv=f"{SMALL} {flags}".split())
    assert caplog.text.count(words) == 1, caplog.text
