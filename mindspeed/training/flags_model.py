"""Rows of the flag table that describe the model and how it learns."""

from __future__ import annotations

from mindspeed.training.flag_kinds import float_flag, int_flag, moe_layer_freq, str_flag, switch_off, switch_on, value_flag

NETWORK = (
    int_flag("--num-layers", None, "Transformer layers of the whole model.", at_least=1),
    int_flag("--hidden-size", None, "Width of the residual stream.", at_least=1),
    int_flag(
        "--ffn-hidden-size", None, "Inner width of the MLP; 4 x hidden size, or 8/3 of it rounded to 64 when gated.", at_least=1
    ),
    int_flag("--num-attention-heads", None, "Query heads per layer.", at_least=1),
    int_flag("--kv-channels", None, "Size of one head; hidden size / heads if not given.", at_least=1),
    switch_on("--group-query-attention", "Share keys and values between groups of query heads."),
    int_flag("--num-query-groups", 1, "Key/value heads when --group-query-attention is on.", at_least=1),
    int_flag("--max-position-embeddings", None, "Longest sequence that the model can represent.", at_least=1),
    str_flag(
        "--position-embedding-type",
        "learned_absolute",
        "How positions enter the model.",
        choices=("learned_absolute", "rope", "mrope", "relative", "none"),
    ),
    switch_on("--use-rotary-position-embeddings", "Older spelling of --position-embedding-type rope."),
    int_flag("--rotary-base", 10000, "Base of the rotary frequencies.", at_least=1),
    float_flag("--rotary-percent", 1.0, "Share of each head that is rotated.", at_least=0, at_most=1),
    switch_on("--rotary-interleaved", "Rotate neighbouring channels instead of the two halves of a head."),
    int_flag(
        "--rotary-seq-len-interpolation-factor", None, "Divide positions by this number before they are rotated.", at_least=1
    ),
    switch_on("--use-rope-scaling", "Scale rotary frequencies as Llama 3.1 does."),
    float_flag("--rope-scaling-factor", 8.0, "Factor of --use-rope-scaling.", at_least=1),
    switch_off("--no-position-embedding", "add_position_embedding", "Deprecated; use --position-embedding-type."),
    int_flag("--make-vocab-size-divisible-by", 128, "Pad the vocabulary to a multiple of this times the TP size.", at_least=1),
    str_flag("--normalization", "LayerNorm", "Normalisation layer.", choices=("LayerNorm", "RMSNorm")),
    float_flag("--norm-epsilon", 1e-5, "Epsilon inside the normalisation.", at_least=0),
    switch_on("--apply-layernorm-1p", "Learn the norm's weight around one instead of around zero."),
    switch_on("--apply-residual-connection-post-layernorm", "Take the residual after the norm."),
    switch_on("--squared-relu", "Use squared ReLU instead of GELU."),
    switch_on("--swiglu", "Use a gated MLP with SiLU."),
    switch_on("--untie-embeddings-and-output-weights", "Give the output layer its own weight."),
    switch_off("--disable-bias-linear", "add_bias_linear", "Leave out the biases of linear layers."),
    switch_on("--add-qkv-bias", "Give only the query/key/value projection a bias."),
    switch_on("--qk-layernorm", "Normalise queries and keys per head."),
    switch_on("--multi-latent-attention", "Use multi-latent attention (compressed keys and values)."),
    int_flag("--mtp-num-layers", None, "Extra layers that predict further tokens ahead.", at_least=1),
    float_flag("--mtp-loss-scaling-factor", 0.1, "Weight of the multi-token-prediction loss."),
    str_flag("--transformer-impl", "transformer_engine", "Layer implementation.", choices=("local", "transformer_engine")),
    str_flag("--spec", None, "Layer spec as `module function`.", is_many=True),
    switch_on("--use-flash-attn", "Use a flash-attention kernel where one is available."),
)

LATENT_ATTENTION = (
    int_flag("--q-lora-rank", None, "Rank of the query compression; none without it.", at_least=1),
    int_flag("--kv-lora-rank", 32, "Rank of the key/value compression.", at_least=1),
    int_flag("--qk-head-dim", 128, "Part of a query/key head without position.", at_least=1),
    int_flag("--qk-pos-emb-head-dim", 64, "Part of a query/key head that is rotated.", at_least=1),
    int_flag("--v-head-dim", 128, "Size of a value head.", at_least=1),
    float_flag("--rotary-scaling-factor", 1.0, "Context extension factor of YaRN."),
    float_flag("--mscale", 1.0, "Attention temperature factor of YaRN."),
    float_flag("--mscale-all-dim", 1.0, "Attention temperature factor of YaRN over all dimensions."),
)

REGULARISATION = (
    float_flag("--attention-dropout", 0.1, "Dropout of attention weights.", at_least=0, at_most=1),
    float_flag("--hidden-dropout", 0.1, "Dropout of layer outputs.", at_least=0, at_most=1),
    float_flag("--weight-decay", 0.01, "Weight decay."),
    float_flag("--start-weight-decay", None, "First value of a growing weight decay."),
    float_flag("--end-weight-decay", None, "Last value of a growing weight decay."),
    str_flag("--weight-decay-incr-style", "constant", "How weight decay grows.", choices=("constant", "linear", "cosine")),
    float_flag("--clip-grad", 1.0, "Largest global gradient norm; 0 turns clipping off.", at_least=0),
    float_flag("--adam-beta1", 0.9, "Decay of Adam's first moment.", at_least=0, at_most=1),
    float_flag("--adam-beta2", 0.999, "Decay of Adam's second moment.", at_least=0, at_most=1),
    float_flag("--adam-eps", 1e-8, "Epsilon of Adam.", at_least=0),
    float_flag("--sgd-momentum", 0.9, "Momentum of SGD.", at_least=0),
)

TRAINING = (
    int_flag("--micro-batch-size", None, "Samples of one forward pass on one data-parallel rank.", at_least=1),
    int_flag("--global-batch-size", None, "Samples of one optimizer step over all ranks.", at_least=1),
    str_flag("--rampup-batch-size", None, "Grow the batch: start size, increment, samples of the ramp.", is_many=True),
    switch_on("--decrease-batch-size-if-needed", "Use the largest smaller batch that divides, instead of stopping."),
    int_flag("--train-iters", None, "Optimizer steps to train.", at_least=0),
    int_flag("--train-samples", None, "Samples to train, instead of --train-iters.", at_least=1),
    str_flag("--optimizer", "adam", "Optimizer.", choices=("adam", "sgd")),
    str_flag("--dataloader-type", None, "Order of samples: single pass or cyclic.", choices=("single", "cyclic", "external")),
    int_flag("--exit-interval", None, "Save and leave after a multiple of this many steps.", at_least=1),
    int_flag("--exit-duration-in-mins", None, "Save and leave after this many minutes.", at_least=1),
    switch_on("--exit-signal-handler", "Save and leave on SIGTERM; the trainer does so in any case."),
    int_flag("--iterations-to-skip", [], "Steps whose data is drawn but not trained on.", is_many=True),
    switch_on("--manual-gc", "Collect garbage at fixed steps only."),
    int_flag("--manual-gc-interval", 0, "Steps between manual collections.", at_least=0),
    switch_off("--no-manual-gc-eval", "manual_gc_eval", "Do not collect around an evaluation."),
    int_flag("--empty-unused-memory-level", 0, "Return cached device memory each step (1) or twice (2).", choices=(0, 1, 2)),
    int_flag("--train-sync-interval", None, "Steps between device synchronisations.", at_least=1),
    switch_on("--deterministic-mode", "Ask torch for deterministic algorithms."),
    switch_on("--calculate-per-token-loss", "Weigh every token of the global batch equally."),
    switch_on("--cross-entropy-loss-fusion", "Use the fused cross entropy."),
    str_flag("--cross-entropy-fusion-impl", "native", "Implementation of it.", choices=("native", "te")),
    switch_off("--no-masked-softmax-fusion", "masked_softmax_fusion", "Do not fuse scale, mask and softmax."),
    switch_off("--no-bias-gelu-fusion", "bias_gelu_fusion", "Do not fuse bias and GELU."),
    switch_off("--no-bias-swiglu-fusion", "bias_swiglu_fusion", "Do not fuse bias and SwiGLU."),
    switch_off("--no-bias-dropout-fusion", "bias_dropout_fusion", "Do not fuse bias, dropout and residual."),
    switch_off("--no-rope-fusion", "apply_rope_fusion", "Do not fuse the rotary embedding."),
    switch_off(
        "--no-gradient-accumulation-fusion", "gradient_accumulation_fusion", "Do not add weight gradients inside the matmul."
    ),
    switch_on("--no-persist-layer-norm", "Do not use the persistent layer-norm kernel."),
    str_flag(
        "--rerun-mode",
        "disabled",
        "What to do with suspicious results.",
        choices=("disabled", "validate_results", "report_stats"),
    ),
    int_flag("--error-injection-rate", 0, "Inject an error once in this many results (tests of --rerun-mode).", at_least=0),
    str_flag(
        "--error-injection-type",
        "transient_error",
        "Kind of the injected error.",
        choices=("correct_result", "transient_error", "persistent_error"),
    ),
    str_flag("--result-rejected-tracker-filename", None, "File that records rejected results."),
    switch_off("--no-check-for-nan-in-loss-and-grad", "check_for_nan_in_loss_and_grad", "Do not stop on NaN or Inf."),
    switch_on("--check-for-spiky-loss", "Report a loss far above the largest seen."),
    switch_on("--check-for-large-grads", "Report unusually large gradients."),
)

RECOMPUTE = (
    switch_on("--recompute-activations", "Older spelling of --recompute-granularity selective."),
    str_flag(
        "--recompute-granularity", None, "Recompute whole layers or chosen modules in backward.", choices=("full", "selective")
    ),
    str_flag("--recompute-method", None, "Which layers full recompute takes.", choices=("uniform", "block")),
    int_flag("--recompute-num-layers", None, "Layers per recomputed unit (uniform) or per stage (block).", at_least=0),
    str_flag("--recompute-modules", None, "Modules that selective recompute takes.", is_many=True),
    switch_on("--distribute-saved-activations", "Split saved activations over tensor-parallel ranks."),
    switch_off(
        "--no-clone-scatter-output-in-embedding", "clone_scatter_output_in_embedding", "Do not clone the scattered embedding."
    ),
)

LEARNING_RATE = (
    float_flag("--lr", None, "Largest learning rate.", at_least=0),
    str_flag(
        "--lr-decay-style",
        "linear",
        "Shape of the decay.",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    ),
    str_flag(
        "--lr-wsd-decay-style", "exponential", "Shape of the last phase of WSD.", choices=("exponential", "linear", "cosine")
    ),
    int_flag("--lr-decay-iters", None, "Steps of the decay; all steps if not given.", at_least=1),
    int_flag("--lr-decay-samples", None, "Samples of the decay.", at_least=1),
    int_flag("--lr-wsd-decay-samples", None, "Samples of the last phase of WSD.", at_least=0),
    int_flag("--lr-wsd-decay-iters", None, "Steps of the last phase of WSD.", at_least=0),
    float_flag("--lr-warmup-fraction", None, "Share of the decay spent warming up.", at_least=0, at_most=1),
    int_flag("--lr-warmup-iters", 0, "Steps of the warm-up.", at_least=0),
    int_flag("--lr-warmup-samples", 0, "Samples of the warm-up.", at_least=0),
    float_flag("--lr-warmup-init", 0.0, "Learning rate at the start of the warm-up.", at_least=0),
    float_flag("--min-lr", 0.0, "Smallest learning rate after the decay.", at_least=0),
    switch_on("--override-opt_param-scheduler", "Keep this command's schedule when a checkpoint has another."),
    switch_on("--use-checkpoint-opt_param-scheduler", "Take the schedule from the checkpoint."),
    float_flag("--decoupled-lr", None, "Separate learning rate of embedding and output layer.", at_least=0),
    float_flag("--decoupled-min-lr", None, "Smallest value of it.", at_least=0),
)

INITIALISATION = (
    int_flag("--seed", 1234, "Seed of all random numbers.", at_least=1),
    switch_on("--data-parallel-random-init", "Draw different weights on each data-parallel rank, then broadcast."),
    float_flag("--init-method-std", 0.02, "Standard deviation of initial weights.", at_least=0),
    switch_on("--init-method-xavier-uniform", "Draw initial weights from Xavier's uniform distribution."),
    switch_off("--no-initialization", "perform_initialization", "Leave weights uninitialised (a checkpoint follows)."),
    switch_on("--use-cpu-initialization", "Draw weights on the CPU, independent of the layout of a layer.", default=None),
)

MIXED_PRECISION = (
    switch_on("--fp16", "Train in fp16 with loss scaling."),
    switch_on("--bf16", "Train in bf16."),
    switch_on("--grad-reduce-in-bf16", "Reduce gradients in bf16."),
    float_flag("--loss-scale", None, "Fixed loss scale; dynamic if not given.", at_least=0),
    float_flag("--initial-loss-scale", 4294967296, "First dynamic loss scale.", at_least=1),
    float_flag("--min-loss-scale", 1.0, "Smallest dynamic loss scale.", at_least=0),
    float_flag("--loss-scale-window", 1000, "Good steps before the dynamic scale doubles.", at_least=1),
    int_flag("--hysteresis", 2, "Bad steps before the dynamic scale halves.", at_least=1),
    switch_on("--fp32-residual-connection", "Keep the residual stream in fp32."),
    switch_on("--apply-query-key-layer-scaling", "Scale scores by the layer number (fp16)."),
    switch_on("--attention-softmax-in-fp32", "Compute attention softmax in fp32."),
    switch_on("--accumulate-allreduce-grads-in-fp32", "Accumulate and reduce gradients in fp32."),
    switch_on("--fp16-lm-cross-entropy", "Leave logits in fp16 for the loss."),
)

MIXTURE_OF_EXPERTS = (
    int_flag("--num-experts", None, "Experts per layer; a dense MLP without it.", at_least=0),
    value_flag(
        "--moe-layer-freq", moe_layer_freq, 1, "Which layers have experts: every n-th, or a list such as ([0]+[1]*3)*2."
    ),
    int_flag("--moe-ffn-hidden-size", None, "Inner width of one expert; that of the MLP if not given.", at_least=1),
    int_flag("--moe-shared-expert-intermediate-size", None, "Inner width of the experts that see every token.", at_least=1),
    switch_on("--moe-shared-expert-overlap", "Run shared experts while tokens travel."),
    switch_on("--moe-grouped-gemm", "Multiply all experts of a rank in one call."),
    switch_on("--moe-use-legacy-grouped-gemm", "Use the older grouped expert layer."),
    switch_on("--moe-layer-recompute", "Recompute the whole expert layer in backward."),
    switch_on("--moe-extended-tp", "Deprecated; use --expert-tensor-parallel-size."),
    str_flag(
        "--moe-router-load-balancing-type",
        "aux_loss",
        "How tokens are balanced over experts.",
        choices=("aux_loss", "seq_aux_loss", "sinkhorn", "none"),
    ),
    str_flag("--moe-router-dtype", None, "Type of the router's arithmetic.", choices=("fp32", "fp64")),
    str_flag("--moe-router-score-function", "softmax", "Function of the router's scores.", choices=("softmax", "sigmoid")),
    int_flag("--moe-router-topk", 2, "Experts per token.", at_least=1),
    switch_on("--moe-router-pre-softmax", "Apply softmax before the choice of experts."),
    int_flag("--moe-router-num-groups", None, "Groups of experts for a limited choice.", at_least=1),
    int_flag("--moe-router-group-topk", None, "Groups that a token may use.", at_least=1),
    float_flag("--moe-router-topk-scaling-factor", None, "Factor of the chosen scores."),
    switch_on("--moe-router-enable-expert-bias", "Balance with a bias per expert instead of a loss."),
    float_flag("--moe-router-bias-update-rate", 1e-3, "Step of that bias."),
    float_flag("--moe-aux-loss-coeff", 0.0, "Weight of the balancing loss."),
    float_flag("--moe-z-loss-coeff", None, "Weight of the router's z-loss."),
    float_flag("--moe-input-jitter-eps", None, "Noise on the router's input."),
    str_flag(
        "--moe-token-dispatcher-type",
        "allgather",
        "How tokens reach their experts.",
        choices=("allgather", "alltoall", "flex", "alltoall_seq"),
    ),
    switch_on("--moe-per-layer-logging", "Log router losses of each layer."),
    switch_on("--moe-permute-fusion", "Fuse the token permutation."),
    float_flag("--moe-expert-capacity-factor", None, "Largest share of tokens per expert.", at_least=0),
    switch_on("--moe-pad-expert-input-to-capacity", "Pad each expert's input to its capacity."),
    str_flag("--moe-token-drop-policy", "probs", "Which tokens an overfull expert drops.", choices=("probs", "position")),
)
