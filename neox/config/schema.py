"""The schema of a run: one frozen model per YAML section. Every key a user may write is a field here.

Values that follow from others (`head_dim`, `num_kv_heads`, ...) are filled in before validation, so that code which
reads a config never meets None where a number is meant. Nothing assigns to a config.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]

Adapted = Literal["attention.qkv", "attention.out", "mlp.up", "mlp.gate", "mlp.down"]

FORMER_PACKING = {"packed": "concatenate", "documents": "document"}  # names in configs of earlier versions
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}  # activation -> function applied to the gate


class Section(BaseModel):
    """A frozen section that refuses unknown keys and values of another type: "3" is no number, 1 is no boolean."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class RopeScaling(Section):
    """How rotary frequencies are stretched beyond the length they were trained for."""

    type: Literal["linear", "ntk", "yarn", "llama3"] = Field(
        description="linear (position interpolation), ntk (dynamic NTK base), yarn (arXiv 2309.00071), llama3"
    )
    factor: PositiveFloat = Field(description="extension factor: new length / original length")
    original_max_position_embeddings: Positive | None = Field(None, description="length of the original training, tokens; needed by yarn and llama3")
    low_freq_factor: PositiveFloat = Field(1.0, description="llama3: wavelengths above original / low_freq_factor are scaled fully")
    high_freq_factor: PositiveFloat = Field(4.0, description="llama3: wavelengths below original / high_freq_factor are kept")
    beta_fast: PositiveFloat = Field(32.0, description="yarn: rotations above which a channel is kept")
    beta_slow: PositiveFloat = Field(1.0, description="yarn: rotations below which a channel is interpolated")
    attention_factor: PositiveFloat | None = Field(None, description="yarn: factor on cos and sin; None: 0.1 ln(factor) + 1")


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685): W + alpha / rank B A, of which only A and B are trained."""

    rank: Positive = Field(description="rows of A and columns of B")
    alpha: PositiveFloat = Field(16.0, description="the product B A is scaled by alpha / rank")
    targets: Annotated[tuple[Literal["attention.qkv", "attention.out", "mlp.up", "mlp.gate", "mlp.down"], ...], Field(strict=False, min_length=1)] = Field(
        ("attention.qkv", "attention.out", "mlp.up", "mlp.gate", "mlp.down"),
        description="matrices of a block that get one; mlp.gate exists where the MLP is gated",
    )


class ModelConfig(Section):
    """The architecture."""

    num_layers: Positive = Field(12, description="transformer blocks")
    hidden_size: Positive = Field(768, description="width of the residual stream")
    num_attention_heads: Positive = Field(12, description="query heads")
    num_kv_heads: Positive = Field(description="key/value heads; default num_attention_heads, 1 is multi-query attention")
    head_dim: Positive = Field(description="channels of a head; default hidden_size / num_attention_heads")
    intermediate_size: Positive = Field(description="width of the MLP (of each half where it is gated); default 4 x hidden_size")
    max_position_embeddings: Positive = Field(2048, description="longest sequence the model is meant for, tokens")
    vocab_size: Positive = Field(description="token ids 0 .. vocab_size - 1; default: the largest id of tokenizer.file + 1")
    vocab_multiple: Positive = Field(128, description="embedding rows are padded to a multiple of this x parallel.tensor; checkpoints don't see the padding")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="normalisation of the blocks and of the output")
    norm_eps: PositiveFloat = Field(1e-5, description="added to the variance (layernorm) or mean square (rmsnorm)")
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu", "reglu"] = Field(
        "gelu", description="gelu is the erf form; swiglu, geglu, reglu are gated"
    )
    position_embedding: Literal["rotary", "learned", "alibi", "none"] = Field("rotary", description="how positions enter the model")
    rotary_pct: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of head_dim that is rotated, from the first channel on")
    rope_theta: PositiveFloat = Field(10000.0, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(None, description="stretching of the rotary frequencies; null: none")
    parallel_residual: bool = Field(False, description="x + attention(norm1(x)) + mlp(norm2(x)) instead of two steps")
    shared_residual_norm: bool = Field(False, description="parallel residual: one norm feeds both branches (GPT-J)")
    tie_embeddings: bool = Field(False, description="output projection shares the word embedding")
    qkv_bias: bool = Field(True, description="bias on the query, key and value projection")
    attention_out_bias: bool = Field(True, description="bias on the output projection of the attention")
    mlp_bias: bool = Field(True, description="biases in the MLP")
    qk_norm: bool = Field(False, description="RMSNorm over head_dim on queries and keys before the rotation (Qwen3)")
    sliding_window: Positive | None = Field(None, description="keys a query sees, itself included; null: all")
    attention_softcap: PositiveFloat | None = Field(None, description="scores become cap x tanh(score / cap); null: off")
    attention_dropout: Probability = Field(0.0, description="dropout on the attention probabilities")
    hidden_dropout: Probability = Field(0.0, description="dropout on the embedding and on what a branch adds to the residual stream")
    init: Literal["normal", "scaled_normal", "small_init", "wang_init"] = Field(
        "normal", description="initialisation of weights; scaled_normal: std / sqrt(2 num_layers)"
    )
    output_init: Literal["normal", "scaled_normal", "small_init", "wang_init"] = Field(
        "scaled_normal", description="initialisation of the projections that write to the residual stream"
    )
    init_std: PositiveFloat = Field(0.02, description="standard deviation of normal and scaled_normal")
    output: Literal["tokens", "score"] = Field("tokens", description="tokens: logits over the vocabulary; score: one number per position (reward models)")
    lora: LoraConfig | None = Field(None, description="train low-rank adapters and nothing else; null: train everything")
    attention_backend: Literal["auto", "native", "sdpa"] = Field(
        "auto", description="native: our kernels; sdpa: torch; auto: the faster by the table in neox/ops/attention.py"
    )

    @model_validator(mode="before")
    @classmethod
    def fill_derived(cls, values: Any) -> Any:
        """Fill in what follows from other keys; leaves values of a wrong type for the field checks to report."""
        if not isinstance(values, dict):
            return values
        out = dict(values)
        hidden = out.get("hidden_size", 768)
        heads = out.get("num_attention_heads", 12)
        if out.get("num_kv_heads") is None:
            out["num_kv_heads"] = heads
        if out.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            out["head_dim"] = hidden // heads
        if out.get("intermediate_size") is None and isinstance(hidden, int):
            out["intermediate_size"] = 4 * hidden
        return out

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies by a gate."""
        return self.activation in GATED

    @property
    def rotary_dim(self) -> int:
        """Rotated channels of a head, even."""
        if self.position_embedding != "rotary":
            return 0
        return int(self.head_dim * self.rotary_pct) // 2 * 2

    def padded_vocab_size(self, tp: int = 1) -> int:
        """Rows of the embedding in memory: vocab_size rounded up to a multiple of vocab_multiple x tp."""
        multiple = self.vocab_multiple * tp
        return (self.vocab_size + multiple - 1) // multiple * multiple


class DataSource(Section):
    """One indexed dataset of a blend."""

    path: str = Field(description="prefix of PREFIX.bin and PREFIX.idx")
    weight: NonNegativeFloat = Field(1.0, description="share of the samples; weights are normalised")
    labels: str | None = Field(None, description="prefix of the dataset's labels: -100 where a token is not to be learned, else the token; null: all are")
    rejected: str | None = Field(None, description="prefix of the rejected answers, document by document, of which `path` holds the chosen ones")
    rejected_labels: str | None = Field(None, description="labels of `rejected`")


class FimConfig(Section):
    """Fill in the middle (arXiv 2207.14255): documents of training samples are cut in three, and the middle is put last."""

    rate: Share = Field(0.0, description="share of the documents that are transformed; 0: none")
    spm_rate: Share = Field(0.5, description="share of these in the order suffix, prefix, middle; the others are prefix, suffix, middle")
    split_sample: str | None = Field(None, description="token that divides a document into fragments (files of a repository), transformed each; null: none")
    fragment_rate: Share = Field(0.5, description="with split_sample: share of the fragments of a chosen document that are transformed")
    no_prefix: str | None = Field(None, description="text and fragments that begin with this are left as they are; null: none are")
    prefix_token: str = Field("<|fim_prefix|>", description="token before the prefix; it has to be in tokenizer.file")
    middle_token: str = Field("<|fim_middle|>", description="token before the middle")
    suffix_token: str = Field("<|fim_suffix|>", description="token before the suffix")


class DataConfig(Section):
    """What is trained on: train/validation/test lists, or one path or text that `split` cuts."""

    train: tuple[DataSource, ...] = Field((), description="datasets of the training set: prefixes, or {path, weight}")
    validation: tuple[DataSource, ...] = Field((), description="datasets of the validation set")
    test: tuple[DataSource, ...] = Field((), description="datasets of the test set")
    path: str | None = Field(None, description="prefix of one dataset, cut into train, validation and test by `split`")
    text: tuple[str, ...] = Field(
        (), strict=False, description="text and JSON-lines files, or folders of them, that the run tokenizes itself, once; cut by `split` as `path` is"
    )
    text_cache: str | None = Field(None, description="folder for what is made of `text`; runs may share one; null: run.dir/text")
    split: str = Field("969,30,1", description="shares of train, validation, test when data.path or data.text is used")
    seq_length: Positive = Field(2048, description="tokens of a sample that the model reads (one more is read as last target)")
    order: Literal["epoch", "neox"] = Field("epoch", description="epoch: pure function of seed and sample index; neox: GPT-NeoX's shuffle, bit for bit")
    packing: Literal["concatenate", "best_fit", "document"] = Field(
        "concatenate",
        description="concatenate: samples are cut from the stream of documents; best_fit: documents are put together whole, those longer than a sample cut "
        "(arXiv 2404.10830); document: a sample is one document, cut off or padded to seq_length",
    )
    fim: FimConfig = Field(FimConfig(), description="fill in the middle")
    document_mask: bool = Field(False, description="attention and positions stop at document borders")
    prefetch: NonNegative = Field(2, description="batches read ahead by a background thread; 0: none")
    index_cache: str | None = Field(None, description="folder for the index arrays of order: neox; null: beside the data, else in run.dir")

    @model_validator(mode="before")
    @classmethod
    def accept_short_forms(cls, values: Any) -> Any:
        """`train: a` and `train: [a, {path: b, weight: 2}]` mean lists of sources."""
        if not isinstance(values, dict):
            return values
        out = dict(values)
        for key in ("train", "validation", "test"):
            if isinstance(out.get(key), str):
                out[key] = [out[key]]
            if isinstance(out.get(key), (list, tuple)):
                out[key] = tuple({"path": item} if isinstance(item, str) else item for item in out[key])
        if isinstance(out.get("text"), str):
            out["text"] = (out["text"],)
        if isinstance(out.get("packing"), str):
            out["packing"] = FORMER_PACKING.get(out["packing"], out["packing"])
        return out


class SpecialIds(Section):
    """Ids of special tokens as an imported model's files name them; an export writes them again, and generation ends at eos and stop."""

    bos: int | None = Field(None, description="bos_token_id of its config.json")
    eos: int | Annotated[tuple[int, ...], Field(strict=False)] | None = Field(None, description="eos_token_id of its config.json: an id, or a list of ids")
    pad: int | None = Field(None, description="pad_token_id of its config.json")
    stop: Annotated[tuple[int, ...], Field(strict=False)] = Field((), description="further ids that end a text: eos_token_id of its generation_config.json")

    def ends(self) -> frozenset[int]:
        """Every id that ends a generated text."""
        return frozenset(() if self.eos is None else (self.eos,) if isinstance(self.eos, int) else self.eos) | frozenset(self.stop)


class TokenizerConfig(Section):
    """The tokenizer that made the data."""

    file: str | None = Field(None, description="path of a `tokenizers` JSON file; needed for generation from text, evaluation and vocab_size's default")
    eod_token: str | None = Field(None, description="end-of-document token; null: found by name (<|endoftext|>, </s>, <|end_of_text|>, <eos>)")
    special_ids: SpecialIds | None = Field(None, description="ids of an imported model, which neox import fills in; null: those of the end-of-document token")


class OptimizerConfig(Section):
    """The optimizer. Biases, norms and other one-dimensional parameters are never decayed."""

    type: Literal["adamw", "lion", "sgd", "muon"] = Field(
        "adamw", description="adamw (fused), lion (arXiv 2302.06675), sgd, muon (matrices; adamw for the rest)"
    )
    lr: PositiveFloat = Field(6e-4, description="peak learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), strict=False, description="decay of the first and second moment"
    )
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NonNegativeFloat = Field(0.1, description="decoupled weight decay of matrices")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd: momentum; muon: momentum of the matrices")
    gradient_clipping: NonNegativeFloat = Field(1.0, description="largest global L2 norm of the gradient; 0: no clipping")
    row_bias_lr_multiplier: Annotated[int, Field(ge=1, le=1024)] = Field(
        1,
        description="multiplies the learning rate of the row-parallel biases (attention.out.bias, mlp.down.bias). For runs that continue or repeat one of "
        "GPT-NeoX with gpt_j_residual: its model_parallel_size, as it trains that many copies of them and adds all of them",
    )


def whole(number: float) -> float:
    """An int where the number is one, so that 20 stays 20 in config.lock.yml."""
    return int(number) if number == int(number) else number


class ScheduleConfig(Section):
    """The learning rate over the iterations; after decay_iters it stays at min_lr, unless `rule` says otherwise."""

    type: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = Field(
        "cosine", description="wsd: warm-up, stable, decay over the last cooldown_iters"
    )
    rule: Literal["native", "gpt_neox"] = Field(
        "native",
        description="native: a function of the step, flat after decay_iters; gpt_neox: a function of the updates made before the step, as GPT-NeoX "
        "computes it (constant, linear, cosine): linear heads for 0 and stops at min_lr, the cosine rises again after decay_iters",
    )
    warmup_iters: Annotated[NonNegativeFloat, AfterValidator(whole)] = Field(
        0, description="iterations of linear warm-up from 0; a fraction is accepted with rule: gpt_neox only"
    )
    decay_iters: Positive | None = Field(None, description="iteration at which min_lr is reached; null: train.train_iters")
    cooldown_iters: NonNegative = Field(0, description="wsd: iterations of the final decay")
    min_lr: NonNegativeFloat = Field(0.0, description="learning rate at and after decay_iters")


class PrecisionConfig(Section):
    """Number formats. Master weights, moments, gradient accumulation and statistics are fp32 in every case."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="dtype of weights and activations in forward and backward")
    initial_scale_power: NonNegative = Field(16, description="fp16: the loss scale starts at 2 to this power")
    loss_scale_window: Positive = Field(1000, description="fp16: good steps after which the loss scale doubles")
    min_loss_scale: PositiveFloat = Field(1.0, description="fp16: smallest loss scale")


class ParallelConfig(Section):
    """How a model is cut over processes; data parallelism takes the processes that are left."""

    tensor: Positive = Field(1, description="processes that share each layer")
    pipeline: Positive = Field(1, description="stages that the layers are cut into")
    sequence: bool = Field(False, description="sequence parallelism: norms and residual stream cut over the tensor group")
    context: Positive = Field(1, description="context parallelism: processes that share the sequence of each sample; each attends with a part of the heads")
    partition: Literal["parameters", "time"] | Annotated[tuple[Positive, ...], Field(strict=False)] = Field(
        "parameters", description="blocks per stage: so that parameters or time of the largest stage are small, or a list of numbers"
    )


class ZeroConfig(Section):
    """DeepSpeed ZeRO: what data-parallel processes cut instead of copying."""

    stage: Annotated[int, Field(ge=0, le=3)] = Field(1, description="0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters")


class TrainConfig(Section):
    """Length and batch of a run. global_batch_size = micro_batch_size x gradient_accumulation x data-parallel size; any one may be left out."""

    train_iters: Positive = Field(1000, description="optimizer steps")
    micro_batch_size: Positive | None = Field(None, description="samples of one forward pass of one process")
    gradient_accumulation: Positive | None = Field(None, description="forward passes of one process per optimizer step")
    global_batch_size: Positive | None = Field(None, description="samples per optimizer step over all processes")
    seed: NonNegative = Field(1234, description="seed of initialisation, data order and dropout")
    deterministic: bool = Field(
        False,
        description="repeat a run bit for bit on a GPU too: torch's deterministic algorithms, and a fixed workspace of cuBLAS; slower, "
        "and an error where an operation has no deterministic form",
    )
    objective: Literal["pretrain", "sft", "dpo", "reward"] = Field(
        "pretrain",
        description="pretrain: next token; sft: next token where the labels say so; dpo: preferences (arXiv 2305.18290) against the initial weights; "
        "reward: a score that ranks the chosen answer above the rejected one (Bradley-Terry)",
    )
    dpo_beta: PositiveFloat = Field(0.1, description="dpo: weight of the distance from the initial weights")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="recompute in the backward: nothing, the MLP's inner activations, whole blocks"
    )


class SavingConfig(Section):
    """Saving and resuming, in run.dir/checkpoints."""

    save_interval: NonNegative = Field(1000, description="iterations between checkpoints; the last iteration is always saved; 0: only the last")
    save_iters: tuple[NonNegative, ...] = Field((), strict=False, description="further iterations after which a checkpoint is saved; 0: the initial weights")
    keep: NonNegative = Field(0, description="newest checkpoints to keep; 0: all")
    resume: str = Field(
        "auto",
        description="auto: newest complete checkpoint of the run, else start; must: error if there is none; "
        "never: start anew, error if the run has any; PATH: that checkpoint",
    )
    init_from: str | None = Field(
        None, description="checkpoint whose weights, and nothing else, a new run starts from; ignored where the run resumes one of its own"
    )
    accept_data_change: bool = Field(
        False, description="resume although the data is not that of the checkpoint: unchanged sources continue where they were, the others begin; for one start"
    )
    on_save_error: Literal["stop", "continue"] = Field("stop", description="what a failed save does to the run")

    @property
    def in_background(self) -> bool:
        """The key `async`, which Python cannot spell as an attribute."""
        return self.__dict__["async"]


CheckpointConfig = create_model(
    "CheckpointConfig",
    __base__=SavingConfig,
    __doc__=SavingConfig.__doc__,
    **{"async": (bool, Field(True, description="write checkpoints in the background, from a copy in host memory; false: training waits"))},
)


class EvaluateConfig(Section):
    """Validation during training."""

    interval: NonNegative = Field(0, description="iterations between evaluations; 0: none")
    iters: Positive = Field(10, description="batches of one evaluation")


class WandbConfig(Section):
    """Weights & Biases. The key is taken from WANDB_API_KEY or `wandb login`."""

    project: str = Field("neox", description="project that the run belongs to")
    entity: str | None = Field(None, description="team or user; null: the key's own")
    group: str | None = Field(None, description="group of runs")
    name: str | None = Field(None, description="name of the run; null: one is made up")
    host: str | None = Field(None, description="URL of a server of one's own")
    mode: Literal["online", "offline"] = Field("online", description="offline: keep the records in run.dir/wandb, for `wandb sync`")


class CometConfig(Section):
    """Comet. The key is taken from COMET_API_KEY or `comet login`."""

    project: str = Field("neox", description="project that the experiment belongs to")
    workspace: str | None = Field(None, description="workspace; null: the key's own")
    name: str | None = Field(None, description="name of the experiment; null: one is made up")
    tags: tuple[str, ...] = Field((), strict=False, description="tags of the experiment")
    mode: Literal["online", "offline"] = Field("online", description="offline: keep the records in run.dir/comet, for `comet upload`")


class LoggingConfig(Section):
    """What a run prints and records; metrics.jsonl always gets every step."""

    interval: Positive = Field(10, description="iterations between lines on the terminal and in log.txt")
    tensorboard: bool = Field(True, description="write run.dir/tensorboard")
    wandb: WandbConfig | None = Field(None, description="record the run on Weights & Biases too; null: don't")
    comet: CometConfig | None = Field(None, description="record the run on Comet too; null: don't")


class ProfileConfig(Section):
    """A trace of torch's profiler, in run.dir/profile."""

    start: NonNegative = Field(0, description="first step of the window; 0: none")
    steps: Positive = Field(3, description="steps of the window")
    memory: bool = Field(False, description="record allocations too")


class GuardConfig(Section):
    """What a run watches itself for, and what it does then."""

    non_finite: Literal["stop", "skip"] = Field("stop", description="a loss or gradient that is NaN or infinite: end the run, or leave the update out")
    max_skipped: Positive = Field(5, description="updates left out in a row that are borne; one more ends the run")
    loss_spike: Literal["off", "warn", "skip", "rollback"] = Field(
        "warn", description="a loss that jumps: say so; leave the update out; or go back to the newest checkpoint and on with the data that come next"
    )
    spike_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = Field(3.0, description="a jump is a loss above this many times the median before it")
    spike_window: Positive = Field(64, description="steps over which that median is taken")
    drift_interval: NonNegative = Field(100, description="steps between comparisons of parameters that processes should hold alike; 0: none")
    hang_timeout: NonNegativeFloat = Field(1200.0, description="seconds without progress after which a process counts as stuck and the run is ended; 0: never")


class RunConfig(Section):
    """Where a run leaves its files."""

    dir: str = Field("runs/default", description="folder of the run")


class Config(Section):
    """The whole of a run."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()
    guard: GuardConfig = GuardConfig()
    run: RunConfig = RunConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="keys handed to DeepSpeed as they are, checked against the keys it knows")
