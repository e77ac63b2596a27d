"""Checks of data files before and while a run reads them; every finding is a DataError with path, place and remedy.

For whoever builds datasets (no Megatron import in here):

    for weight, prefix in read_blend(args.data_path):
        index = check_indexed_dataset(prefix)                      # structure: every number of the .idx, size of the .bin
        check_enough_tokens(index, args.seq_length, split=args.split)
    check_cache(args.data_cache_path); mend_cache(args.data_cache_path)       # one rank, before the indices are built
    with cache_failures(args.data_cache_path): build the datasets

and in get_batch, before the tokens go to the device:

    check_token_ids(batch["tokens"], args.padded_vocab_size, where=partial(locate, indices, args.padded_vocab_size))

`GuardedSamples` does the same inside a dataset and then names the documents of the sample. `index.check_unchanged()`
notices files that are replaced during a run.
"""

from mindspeed.data_files.blend import check_enough_tokens, read_blend, read_split, split_tokens
from mindspeed.data_files.cache import cache_failures, check_cache, mend_cache
from mindspeed.data_files.index import Index, check_indexed_dataset
from mindspeed.data_files.paths import FileStamp, is_remote
from mindspeed.data_files.tokens import GuardedSamples, check_token_ids, check_vocab, locate

__all__ = [
    "FileStamp",
    "GuardedSamples",
    "Index",
    "cache_failures",
    "check_cache",
    "check_enough_tokens",
    "check_indexed_dataset",
    "check_token_ids",
    "check_vocab",
    "is_remote",
    "locate",
    "mend_cache",
    "read_blend",
    "read_split",
    "split_tokens",
]
