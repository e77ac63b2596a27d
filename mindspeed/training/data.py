"""Data sets of megatron-core, the order in which ranks take samples from them, and batches on the device."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.rerun_state_machine import RerunDataIterator

from mindspeed import platform
from mindspeed.data_files import (
    Index,
    cache_failures,
    check_cache,
    check_enough_tokens,
    check_indexed_dataset,
    check_token_ids,
    locate,
    mend_cache,
    read_blend,
    read_split,
)
from mindspeed.errors import DataError
from mindspeed.training.session import current, get_args, get_tokenizer

Blend = tuple[list[str], list[float] | None]
Batch = dict[str, torch.Tensor | None]
DatasetsProvider = Callable[[Sequence[int]], tuple[Any, Any, Any]]

_FIRST_STAGE = ("tokens", "attention_mask", "position_ids")
_LAST_STAGE = ("labels", "loss_mask", "attention_mask")
_PREDICTING_STAGE = ("tokens", "position_ids", *_LAST_STAGE)  # multi-token prediction embeds tokens again
_WHOLE_MODEL = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def blends(args: argparse.Namespace) -> tuple[Blend | None, list[Blend | None] | None]:
    """Weighted data set prefixes: one blend to be split, or one for each split."""
    if args.per_split_data_args_path is not None:
        given = json.loads(Path(args.per_split_data_args_path).read_text(encoding="utf-8"))
        lists = [value.split() if isinstance(value, str) else value for value in (given[s] for s in ("train", "valid", "test"))]
        return None, [get_blend_from_list(words) for words in lists]
    if any((args.train_data_path, args.valid_data_path, args.test_data_path)):
        return None, [get_blend_from_list(w) for w in (args.train_data_path, args.valid_data_path, args.test_data_path)]
    if args.data_args_path is not None:
        return get_blend_from_list(Path(args.data_args_path).read_text(encoding="utf-8").split()), None
    return (get_blend_from_list(args.data_path), None) if args.data_path else (None, None)


def prefixes(args: argparse.Namespace) -> list[str]:
    """Every data set prefix that the arguments name."""
    whole, split = blends(args)
    return [prefix for blend in (whole, *(split or ())) if blend for prefix in blend[0]]


def check_files(args: argparse.Namespace) -> list[Index]:
    """Look at the structure of every data file before anything is started.

    Raises:
        DataError: a file is missing, damaged or too small, or the cache folder cannot be used.
    """
    if args.data_path:
        read_blend(args.data_path)
    indices = [check_indexed_dataset(prefix) for prefix in dict.fromkeys(prefixes(args))]
    if args.split is not None:
        shares = dict(zip(("train", "valid", "test"), read_split(args.split), strict=True))
        used = [name for name, share in shares.items() if share > 0 and (name == "train" or args.eval_iters > 0)]
        for index in indices:
            check_enough_tokens(index, args.seq_length, split=args.split, used=used)
    if args.data_cache_path and args.rank == 0:
        check_cache(args.data_cache_path)
        mend_cache(args.data_cache_path)
    return indices


def is_dataset_built_on_rank() -> bool:
    """Whether this rank reads samples: the first tensor-parallel rank of the first and the last stage."""
    edge = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    return bool(edge) and parallel_state.get_tensor_model_parallel_rank() == 0


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """megatron-core's description of the GPT data sets."""
    blend, blend_per_split = blends(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )


def train_valid_test_datasets_provider(train_val_test_num_samples: Sequence[int]) -> tuple[Any, Any, Any]:
    """Training, validation and test data set, each at least as long as asked for; None where a split is empty."""
    args = get_args()
    kind = MockGPTDataset if args.mock_data else GPTDataset
    builder = BlendedMegatronDatasetBuilder(
        kind, list(train_val_test_num_samples), is_dataset_built_on_rank, dataset_config(args)
    )
    with cache_failures(args.data_cache_path or "beside the data"):
        return tuple(builder.build())  # type: ignore[return-value]


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def num_samples(args: argparse.Namespace) -> tuple[int, int, int]:
    """Samples that training, all validations and the test need."""
    train = args.train_samples or args.train_iters * args.global_batch_size
    evaluations = args.train_iters // args.eval_interval + 1
    return train, evaluations * args.eval_iters * args.global_batch_size, args.eval_iters * args.global_batch_size


class SequentialSampler:
    """Batches of consecutive sample numbers; rank r takes the r-th micro batch of each global slice.

    Args:
        total: samples of the data set.
        consumed: samples taken in earlier runs, over all ranks.
        micro_batch_size: samples per batch.
        rank, ranks: position in the data-parallel group and its size.
    """

    def __init__(self, total: int, consumed: int, micro_batch_size: int, rank: int, ranks: int) -> None:
        if consumed >= total:
            raise DataError(f"the data set has {total} samples and {consumed} are used up; train fewer steps or add data")
        self._starts = range(consumed, total - micro_batch_size * ranks + 1, micro_batch_size * ranks)
        self._offset = rank * micro_batch_size
        self._size = micro_batch_size

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            yield list(range(start + self._offset, start + self._offset + self._size))


class CyclicSampler:
    """Batches in an order that is shuffled anew each epoch, without end.

    With `sharding` each rank shuffles its own contiguous share, otherwise all share one permutation.
    """

    def __init__(self, total: int, consumed: int, micro_batch_size: int, rank: int, ranks: int, *, sharding: bool) -> None:
        if total < micro_batch_size * ranks:
            raise DataError(f"the data set has {total} samples, fewer than one batch of {micro_batch_size} x {ranks} ranks")
        self._total, self._consumed, self._size = total, consumed, micro_batch_size
        self._rank, self._ranks, self._sharding = rank, ranks, sharding

    def __iter__(self) -> Iterator[list[int]]:
        step = self._size * self._ranks
        usable = self._total - self._total % step
        epoch, used = divmod(self._consumed, usable)
        order = self._order(epoch, used)
        for start in range(0, len(order) - self._size + 1, self._size):
            self._consumed += step
            yield order[start : start + self._size]

    def _order(self, epoch: int, used: int) -> list[int]:
        generator = torch.Generator().manual_seed(epoch)
        if self._sharding:
            share = self._total // (self._size * self._ranks) * self._size
            shuffled = torch.randperm(share, generator=generator).tolist()
            return [self._rank * share + index for index in shuffled[used // self._ranks :]]
        shuffled = torch.randperm(self._total // self._size * self._size, generator=generator).tolist()
        return shuffled[used:][self._rank :: self._ranks]


def build_pretraining_data_loader(dataset: Any, consumed_samples: int) -> torch.utils.data.DataLoader | None:
    """Loader of this rank's micro batches from the first sample that earlier runs did not take."""
    if dataset is None:
        return None
    args = get_args()
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    place = (len(dataset), consumed_samples, args.micro_batch_size, rank, ranks)
    sampler: Any
    if args.dataloader_type == "single":
        sampler = SequentialSampler(*place)
    else:
        sampler = CyclicSampler(*place, sharding=args.data_sharding)
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=args.num_workers,
        pin_memory=platform.current().supports("pinned_memory"),
        persistent_workers=args.num_workers > 0,
    )


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _iterator(loader: torch.utils.data.DataLoader | None) -> RerunDataIterator | None:
    if loader is None:
        return None
    return RerunDataIterator(iter(loader) if get_args().dataloader_type == "single" else _endless(loader))


def build_train_valid_test_data_iterators(provider: DatasetsProvider) -> list[RerunDataIterator | None]:
    """Iterators of this rank and model chunk; sets `args.do_train`, `args.do_valid` and `args.do_test` alike on all ranks."""
    args = get_args()
    loaders: list[Any] = [None, None, None]
    wanted = [0, 0, 0]
    if getattr(provider, "is_distributed", False) or parallel_state.get_tensor_model_parallel_rank() == 0:
        datasets = provider(num_samples(args))
        consumed = (args.consumed_train_samples, 0 if args.skip_train else args.consumed_valid_samples, 0)
        loaders = [build_pretraining_data_loader(*pair) for pair in zip(datasets, consumed, strict=True)]
        due = (args.train_iters, args.eval_iters, args.eval_iters)
        wanted = [int(loader is not None and steps > 0) for loader, steps in zip(loaders, due, strict=True)]
    flags = torch.tensor(wanted, dtype=torch.long, device=torch.cuda.current_device())
    torch.distributed.broadcast(flags, 0)
    for name, flag in zip(("do_train", "do_valid", "do_test"), flags.tolist(), strict=True):
        setattr(args, name, bool(flag) or getattr(args, name, False))
    return [_iterator(loader) for loader in loaders]


def get_batch_on_this_tp_rank(data_iterator: Any) -> Batch:
    """Next micro batch, read by the first tensor-parallel rank and sent to the others.

    Returns:
        tokens, labels, position_ids `[B, S]` int64, loss_mask `[B, S]` float32, attention_mask
        `[B, 1, S, S]` bool or None. On an edge stage only what it uses is sent; the rest is None on the
        ranks that do not read.
    """
    args = get_args()
    group, source = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_tensor_model_parallel_src_rank()
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    batch = _read(data_iterator) if reads else _buffers(args)
    sent = _sent_names(args)
    for name in sent:
        if batch[name] is not None:
            torch.distributed.broadcast(batch[name], source, group=group)
    return batch if reads else {name: tensor if name in sent else None for name, tensor in batch.items()}


def _sent_names(args: argparse.Namespace) -> tuple[str, ...]:
    if args.pipeline_model_parallel_size == 1:
        return _WHOLE_MODEL
    if parallel_state.is_pipeline_first_stage():
        return _FIRST_STAGE
    if parallel_state.is_pipeline_last_stage():
        return _LAST_STAGE if args.mtp_num_layers is None else _PREDICTING_STAGE
    return ()


def _read(data_iterator: Any) -> Batch:
    sample = next(data_iterator)
    size, indices = get_args().padded_vocab_size, current().notes.get("data_files", ())
    for name in ("tokens", "labels"):
        check_token_ids(sample[name], size, where=functools.partial(locate, indices, size))
    return {name: sample[name].cuda(non_blocking=True) if name in sample else None for name in _WHOLE_MODEL}


def _buffers(args: argparse.Namespace) -> Batch:
    rows, length = args.micro_batch_size, args.seq_length
    device = torch.cuda.current_device()
    batch: Batch = {name: torch.empty((rows, length), dtype=torch.int64, device=device) for name in _WHOLE_MODEL}
    batch["loss_mask"] = torch.empty((rows, length), dtype=torch.float32, device=device)
    batch["attention_mask"] = None
    if args.create_attention_mask_in_dataloader:
        batch["attention_mask"] = torch.empty((rows, 1, length, length), dtype=torch.bool, device=device)
    return batch


def get_batch_on_this_cp_rank(batch: Batch) -> Batch:
    """This context-parallel rank's part of the sequence of every tensor in the batch."""
    return utils.get_batch_on_this_cp_rank(batch)


def get_batch(data_iterator: Any) -> tuple[torch.Tensor | None, ...]:
    """tokens, labels, loss_mask, attention_mask and position_ids of this rank; all None on inner stages."""
    if not (parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()):
        return (None,) * 5
    batch = get_batch_on_this_cp_rank(get_batch_on_this_tp_rank(data_iterator))
    return tuple(batch[name] for name in _WHOLE_MODEL)
