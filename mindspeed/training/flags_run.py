"""Rows of the flag table that describe the run: layout, data, checkpoints, logs."""

from __future__ import annotations

from mindspeed.training.flag_kinds import int_flag, str_flag, switch_off, switch_on

PARALLEL = (
    int_flag("--tensor-model-parallel-size", 1, "Ranks that share every matrix.", at_least=1),
    int_flag("--pipeline-model-parallel-size", 1, "Ranks that share the layers.", at_least=1),
    int_flag("--decoder-first-pipeline-num-layers", None, "Layers of the first stage.", at_least=0),
    int_flag("--decoder-last-pipeline-num-layers", None, "Layers of the last stage.", at_least=0),
    int_flag(
        "--num-layers-per-virtual-pipeline-stage", None, "Layers of one model chunk in the interleaved schedule.", at_least=1
    ),
    int_flag("--num-virtual-stages-per-pipeline-rank", None, "Model chunks per rank in the interleaved schedule.", at_least=1),
    int_flag(
        "--microbatch-group-size-per-virtual-pipeline-stage",
        None,
        "Micro batches that follow each other through one chunk.",
        dest="microbatch_group_size_per_vp_stage",
        at_least=1,
    ),
    switch_off(
        "--no-overlap-p2p-communication", "overlap_p2p_comm", "Wait for each pipeline message of the interleaved schedule."
    ),
    switch_on(
        "--overlap-p2p-communication-warmup-flush",
        "Overlap pipeline messages in warm-up and flush too.",
        dest="overlap_p2p_comm_warmup_flush",
    ),
    switch_on("--account-for-embedding-in-pipeline-split", "Count the embedding as a layer when layers are split."),
    switch_on("--account-for-loss-in-pipeline-split", "Count the loss as a layer when layers are split."),
    switch_on("--sequence-parallel", "Split norms and dropout along the sequence between tensor-parallel ranks."),
    int_flag("--context-parallel-size", 1, "Ranks that share every sequence.", at_least=1),
    str_flag("--cp-comm-type", ["p2p"], "Communication of context parallelism in Transformer Engine.", is_many=True),
    int_flag("--hierarchical-context-parallel-sizes", None, "Sizes of nested context-parallel groups.", is_many=True),
    int_flag("--expert-model-parallel-size", 1, "Ranks that share the experts.", at_least=1),
    int_flag(
        "--expert-tensor-parallel-size", None, "Ranks that share every expert's matrices; the TP size if not given.", at_least=1
    ),
    switch_on("--use-tp-pp-dp-mapping", "Number ranks along tp, pp, dp instead of tp, dp, pp."),
    str_flag(
        "--distributed-backend",
        "nccl",
        "Backend of torch.distributed; the platform's own if not given.",
        choices=("nccl", "gloo"),
    ),
    int_flag("--distributed-timeout-minutes", 10, "Longest wait of a collective.", at_least=1),
    switch_off("--disable-gloo-process-groups", "enable_gloo_process_groups", "Do not create the extra gloo groups."),
    int_flag("--local-rank", 0, "Rank on this machine; set from the environment.", at_least=0),
)

DATA_PARALLEL = (
    switch_on("--use-distributed-optimizer", "Split optimizer state over data-parallel ranks."),
    switch_on("--overlap-grad-reduce", "Reduce gradients while backward runs."),
    switch_on("--overlap-param-gather", "Gather parameters while forward runs (distributed optimizer)."),
    switch_on("--overlap-param-gather-with-optimizer-step", "Gather the first chunk's parameters inside the optimizer step."),
    switch_off(
        "--no-align-grad-reduce", "align_grad_reduce", "Let pipeline stages start gradient reductions at their own time."
    ),
    switch_off(
        "--no-align-param-gather", "align_param_gather", "Let pipeline stages start parameter gathers at their own time."
    ),
    int_flag("--ddp-num-buckets", None, "Number of gradient buckets.", at_least=1),
    int_flag("--ddp-bucket-size", None, "Elements per gradient bucket.", at_least=1),
    switch_on("--ddp-pad-buckets-for-high-nccl-busbw", "Pad buckets to sizes that NCCL transfers fast."),
    switch_on("--ddp-average-in-collective", "Average inside the collective instead of scaling before it."),
    int_flag("--num-distributed-optimizer-instances", 1, "Groups of ranks that each hold whole optimizer state.", at_least=1),
    switch_on("--use-precision-aware-optimizer", "Choose the types of main gradients and moments."),
    str_flag("--main-grads-dtype", "fp32", "Type of main gradients.", choices=("fp32", "bf16")),
    str_flag("--main-params-dtype", "fp32", "Type of main parameters.", choices=("fp32", "fp16")),
    str_flag("--exp-avg-dtype", "fp32", "Type of Adam's first moment.", choices=("fp32", "fp16", "fp8")),
    str_flag("--exp-avg-sq-dtype", "fp32", "Type of Adam's second moment.", choices=("fp32", "fp16", "fp8")),
    int_flag(
        "--check-weight-hash-across-dp-replicas-interval",
        None,
        "Steps between comparisons of the replicas' weights.",
        at_least=1,
    ),
    switch_off("--no-gradient-reduce-div-fusion", "gradient_reduce_div_fusion", "Scale gradients in a separate pass."),
)

VALIDATION = (
    int_flag("--eval-iters", 100, "Batches of one evaluation.", at_least=0),
    int_flag("--eval-interval", 1000, "Steps between evaluations.", at_least=1),
    switch_on("--skip-train", "Evaluate only."),
)

DATA = (
    str_flag("--data-path", None, "Prefixes of .bin/.idx files, optionally `weight prefix weight prefix`.", is_many=True),
    str_flag("--split", None, "Shares of training, validation and test, such as 949,50,1."),
    str_flag("--train-data-path", None, "Prefixes for training.", is_many=True),
    str_flag("--valid-data-path", None, "Prefixes for validation.", is_many=True),
    str_flag("--test-data-path", None, "Prefixes for the test.", is_many=True),
    str_flag("--data-args-path", None, "File with the contents of --data-path."),
    str_flag("--per-split-data-args-path", None, "JSON file with the prefixes of each split."),
    str_flag("--data-cache-path", None, "Folder for the sample index; beside the data if not given."),
    switch_off("--no-mmap-bin-files", "mmap_bin_files", "Read .bin files instead of mapping them."),
    switch_on("--mock-data", "Train on generated tokens."),
    int_flag("--seq-length", None, "Tokens per sample.", at_least=1),
    int_flag("--num-workers", 2, "Processes that load data, per rank.", at_least=0),
    switch_on("--reset-position-ids", "Restart positions after each end of document."),
    switch_on("--reset-attention-mask", "Keep attention inside a document."),
    switch_on("--eod-mask-loss", "Leave the end-of-document token out of the loss."),
    switch_off(
        "--no-create-attention-mask-in-dataloader",
        "create_attention_mask_in_dataloader",
        "Let the attention layer make the mask.",
    ),
    int_flag("--num-dataset-builder-threads", 1, "Threads that build datasets.", at_least=1),
    switch_off("--no-data-sharding", "data_sharding", "Shuffle over all ranks' samples (cyclic order)."),
)

TOKENIZER = (
    str_flag(
        "--tokenizer-type",
        None,
        "Tokenizer; ByteTokenizer needs no file.",
        choices=("ByteTokenizer", "NullTokenizer", "GPT2BPETokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer"),
    ),
    str_flag("--tokenizer-model", None, "tokenizer.json (or its folder) or the SentencePiece model."),
    str_flag("--vocab-file", None, "vocab.json of GPT2BPETokenizer."),
    str_flag("--merge-file", None, "merges.txt of GPT2BPETokenizer."),
    int_flag("--vocab-size", None, "Tokens without the end-of-document token (NullTokenizer), before padding.", at_least=1),
)

CHECKPOINT = (
    str_flag("--save", None, "Folder that checkpoints are written to."),
    int_flag("--save-interval", None, "Steps between checkpoints.", at_least=1),
    switch_on("--no-save-optim", "Leave the optimizer out of checkpoints.", default=None),
    switch_on("--no-save-rng", "Leave random states out of checkpoints.", default=None),
    str_flag("--load", None, "Folder that the newest checkpoint is read from."),
    switch_on("--no-load-optim", "Do not read the optimizer.", default=None),
    switch_on("--no-load-rng", "Do not read random states.", default=None),
    switch_on("--finetune", "Read weights only and start at step 0."),
    str_flag("--pretrained-checkpoint", None, "Folder to fine-tune from while --load is still empty."),
    int_flag("--ckpt-step", None, "Step of the checkpoint to read, instead of the newest.", at_least=1),
    switch_on("--exit-on-missing-checkpoint", "Stop when --load has no checkpoint."),
    str_flag("--ckpt-format", "torch_dist", "Format that is written; both are read.", choices=("torch", "torch_dist")),
    switch_off(
        "--no-ckpt-fully-parallel-save", "ckpt_fully_parallel_save", "Let the first data-parallel rank write everything."
    ),
    switch_on("--ckpt-fully-parallel-load", "Read each shard once per data-parallel group and exchange it."),
    switch_on("--ckpt-assume-constant-structure", "Reuse the plan of the first save."),
    switch_on("--async-save", "Write checkpoints in the background.", default=None),
    str_flag(
        "--dist-ckpt-strictness",
        "assume_ok_unexpected",
        "What to do with missing or unexpected keys.",
        choices=(
            "assume_ok_unexpected",
            "log_unexpected",
            "log_all",
            "raise_unexpected",
            "raise_all",
            "return_unexpected",
            "return_all",
            "ignore_all",
        ),
    ),
)

LOGGING = (
    int_flag("--log-interval", 100, "Steps between log lines.", at_least=1),
    switch_on("--log-params-norm", "Log the norm of all parameters."),
    switch_on("--log-num-zeros-in-grad", "Log how many gradient elements are zero."),
    switch_on("--log-throughput", "Log TFLOP/s per device."),
    switch_on("--log-progress", "Append milestones to progress.txt in the checkpoint folder."),
    int_flag("--timing-log-level", 0, "Detail of timers.", choices=(0, 1, 2)),
    switch_off("--no-barrier-with-level-1-timing", "barrier_with_L1_time", "No barrier at timers of level 1."),
    str_flag("--timing-log-option", "minmax", "How timers of all ranks are shown.", choices=("max", "minmax", "all")),
    str_flag("--tensorboard-dir", None, "Folder for TensorBoard."),
    int_flag("--tensorboard-log-interval", 1, "Steps between TensorBoard points.", at_least=1),
    int_flag("--tensorboard-queue-size", 1000, "Points that wait before they are written.", at_least=1),
    switch_on("--log-timers-to-tensorboard", "Write timers to TensorBoard."),
    switch_off("--no-log-loss-scale-to-tensorboard", "log_loss_scale_to_tensorboard", "Do not write the loss scale."),
    switch_on("--log-validation-ppl-to-tensorboard", "Write validation perplexity."),
    switch_on("--log-memory-to-tensorboard", "Write memory figures."),
    switch_on("--log-world-size-to-tensorboard", "Write the number of ranks."),
    int_flag("--logging-level", None, "Level of Python's logging.", at_least=0),
    switch_on("--profile", "Profile some steps."),
    int_flag("--profile-step-start", 10, "First profiled step.", at_least=0),
    int_flag("--profile-step-end", 12, "Step at which profiling ends.", at_least=0),
    int_flag("--profile-ranks", [0], "Ranks that are profiled.", is_many=True),
    switch_on("--use-pytorch-profiler", "Write a trace with torch.profiler."),
)

OWN = (
    str_flag("--model-provider", None, "Model to train, as `file.py:function(pre_process, post_process)`; a GPT without it."),
    str_flag("--loss-plot", None, "PNG of loss, validation and learning rate at the end; <save>/loss.png if not given."),
    switch_on("--no-progress", "Never show the updating status line."),
)
