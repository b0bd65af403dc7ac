"""The `model` section: the architecture and its initialisation."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from neox.config.schema.base import PositiveFloat, PositiveInt, Probability, Section

LoraTarget = Literal["attention.qkv", "attention.out", "mlp.up", "mlp.gate", "mlp.down"]
Initialisation = Literal["normal", "scaled_normal", "small_init", "wang_init"]

GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}  # activation -> function applied to the gate


class RopeScaling(Section, frozen=True):
    """Scaling of the rotary frequencies beyond the context length that they were trained for."""

    type: Literal["linear", "ntk", "yarn", "llama3"] = Field(
        description="linear (position interpolation), ntk (dynamic NTK base), yarn (arXiv 2309.00071), llama3"
    )
    factor: PositiveFloat = Field(description="extension factor: new context length / original context length")
    original_max_position_embeddings: PositiveInt | None = Field(
        default=None, description="context length of the original training, tokens; required by yarn and llama3"
    )
    low_freq_factor: PositiveFloat = Field(
        default=1.0, description="llama3: wavelengths above original / low_freq_factor are scaled by the full factor"
    )
    high_freq_factor: PositiveFloat = Field(
        default=4.0, description="llama3: wavelengths below original / high_freq_factor are not scaled"
    )
    beta_fast: PositiveFloat = Field(
        default=32.0, description="yarn: channels with more rotations than this are not scaled"
    )
    beta_slow: PositiveFloat = Field(
        default=1.0, description="yarn: channels with fewer rotations than this are interpolated"
    )
    attention_factor: PositiveFloat | None = Field(
        default=None, description="yarn: factor applied to cos and sin; null: 0.1 ln(factor) + 1"
    )


class LoraConfig(Section, frozen=True):
    """Low-rank adapters (LoRA, arXiv 2106.09685): W + alpha / rank B A, where only A and B are trained."""

    rank: PositiveInt = Field(description="rank of the adapters: rows of A, columns of B")
    alpha: PositiveFloat = Field(default=16.0, description="the product B A is scaled by alpha / rank")
    targets: Annotated[tuple[LoraTarget, ...], Field(strict=False, min_length=1)] = Field(
        default=get_args(LoraTarget),
        description="matrices of each block that get an adapter; mlp.gate exists in a gated MLP only",
    )


class ModelConfig(Section, frozen=True):
    """The architecture.

    Keys that follow from others (`num_kv_heads`, `head_dim`, `intermediate_size`) are filled in before validation, so
    that code which reads a config never meets None in place of a number.
    """

    num_layers: Annotated[int, Field(gt=0, le=10_000)] = Field(default=12, description="transformer blocks")
    hidden_size: PositiveInt = Field(default=768, description="width of the residual stream")
    num_attention_heads: PositiveInt = Field(default=12, description="query heads")
    num_kv_heads: PositiveInt = Field(
        description="key/value heads; default num_attention_heads; 1 is multi-query attention"
    )
    head_dim: PositiveInt = Field(description="channels of a head; default hidden_size / num_attention_heads")
    intermediate_size: PositiveInt = Field(
        description="width of the MLP (in a gated MLP, of each half); default 4 x hidden_size"
    )
    max_position_embeddings: PositiveInt = Field(
        default=2048, description="longest sequence that the model is built for, tokens"
    )
    vocab_size: PositiveInt = Field(
        description="token ids 0 .. vocab_size - 1; default: the largest id of tokenizer.file + 1"
    )
    vocab_multiple: PositiveInt = Field(
        default=128,
        description="embedding rows are padded to a multiple of this x parallel.tensor; checkpoints omit the padding",
    )
    norm: Literal["layernorm", "rmsnorm"] = Field(
        default="layernorm", description="normalisation in the blocks and before the output"
    )
    norm_eps: PositiveFloat = Field(
        default=1e-5, description="added to the variance (layernorm) or mean square (rmsnorm)"
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu", "reglu"] = Field(
        default="gelu", description="gelu is the erf form; swiglu, geglu and reglu are gated"
    )
    position_embedding: Literal["rotary", "learned", "alibi", "none"] = Field(
        default="rotary", description="how positions enter the model"
    )
    rotary_pct: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="fraction of head_dim that is rotated, starting from the first channel"
    )
    rope_theta: PositiveFloat = Field(default=10000.0, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(
        default=None, description="scaling of the rotary frequencies; null: no scaling"
    )
    parallel_residual: bool = Field(
        default=False, description="x + attention(norm1(x)) + mlp(norm2(x)) instead of two sequential steps"
    )
    shared_residual_norm: bool = Field(
        default=False, description="with parallel_residual: one norm feeds both branches (GPT-J)"
    )
    tie_embeddings: bool = Field(
        default=False, description="the output projection shares the weights of the word embedding"
    )
    qkv_bias: bool = Field(default=True, description="bias on the query, key and value projection")
    attention_out_bias: bool = Field(default=True, description="bias on the output projection of the attention")
    mlp_bias: bool = Field(default=True, description="biases in the MLP")
    qk_norm: bool = Field(
        default=False, description="RMSNorm over head_dim on queries and keys, before the rotary embedding (Qwen3)"
    )
    sliding_window: PositiveInt | None = Field(
        default=None, description="keys that a query attends to, itself included; null: all earlier keys"
    )
    attention_softcap: PositiveFloat | None = Field(
        default=None, description="attention scores become cap x tanh(score / cap); null: no cap"
    )
    attention_dropout: Probability = Field(default=0.0, description="dropout on the attention probabilities")
    hidden_dropout: Probability = Field(
        default=0.0, description="dropout on the embedding and on the output of each residual branch"
    )
    init: Initialisation = Field(
        default="normal", description="initialisation of weights; scaled_normal: std / sqrt(2 num_layers)"
    )
    output_init: Initialisation = Field(
        default="scaled_normal", description="initialisation of the projections that write to the residual stream"
    )
    init_std: PositiveFloat = Field(default=0.02, description="standard deviation of normal and scaled_normal")
    output: Literal["tokens", "score"] = Field(
        default="tokens",
        description="tokens: logits over the vocabulary; score: one scalar per position (reward models)",
    )
    lora: LoraConfig | None = Field(default=None, description="train low-rank adapters only; null: train all weights")
    attention_backend: Literal["auto", "native", "sdpa", "hopper"] = Field(
        default="auto",
        description="native: neox kernels; sdpa: torch; hopper: native, with the kernels for sm_90a; auto: the "
        "faster one by the table in neox/ops/attention.py, never hopper",
    )

    @model_validator(mode="before")
    @classmethod
    def fill_derived(cls, values: object) -> object:
        """Fill in the keys that follow from others. Values of a wrong type are left for the field checks to report."""
        if not isinstance(values, dict):
            return values
        filled: dict[str, object] = dict(values)
        hidden, heads = (
            filled.get(key, cls.model_fields[key].default) for key in ("hidden_size", "num_attention_heads")
        )
        if filled.get("num_kv_heads") is None:
            filled["num_kv_heads"] = heads
        if filled.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            filled["head_dim"] = hidden // heads
        if filled.get("intermediate_size") is None and isinstance(hidden, int):
            filled["intermediate_size"] = 4 * hidden
        return filled

    @property
    def gated(self) -> bool:
        """Whether the MLP is gated."""
        return self.activation in GATED

    @property
    def head_is_tied(self) -> bool:
        """Whether the word embedding is also the head. The head of a reward model is a separate row."""
        return self.tie_embeddings and self.output == "tokens"

    @property
    def rotary_dim(self) -> int:
        """Rotated channels of a head, an even number."""
        if self.position_embedding != "rotary":
            return 0
        return int(self.head_dim * self.rotary_pct) // 2 * 2

    def padded_vocab_size(self, tp: int = 1) -> int:
        """Rows of the embedding in memory: vocab_size rounded up to a multiple of vocab_multiple x tp."""
        multiple = self.vocab_multiple * tp
        return (self.vocab_size + multiple - 1) // multiple * multiple

    def undivided(self, tp: int) -> list[str]:
        """Keys whose values a tensor-parallel group of `tp` processes does not divide."""
        keys = ("num_attention_heads", "num_kv_heads", "intermediate_size")
        return [key for key in keys if getattr(self, key) % tp]
