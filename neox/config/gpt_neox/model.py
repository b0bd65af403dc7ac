"""Translation of GPT-NeoX's model keys. Implicit behaviour of GPT-NeoX becomes an explicit value.

Sources: EleutherAI/gpt-neox, `megatron/neox_arguments` and `megatron/model/transformer.py`.
"""

from __future__ import annotations

from pathlib import Path

from neox.config.gpt_neox.keys import GPT_NEOX_KEYS
from neox.config.gpt_neox.translation import Translation
from neox.config.parse import YamlValue
from neox.config.schema import GATED
from neox.config.vocabulary import tokenizer_vocab_size

GPT2_IDS, NEOX_20B_IDS = 50257, 50277
ACTIVATIONS = {"relu": "relu", "silu": "silu", "swish": "silu", "geglu": "geglu", "reglu": "reglu", "swiglu": "swiglu"}
NO_ATTENTION = "with gpt_j_residual and an MLP without biases GPT-NeoX omits the attention from the sum"
INITS = ("normal", "scaled_normal", "small_init", "wang_init")
# (hidden_size, num_layers, num_kv_heads) of published models -> name, real width; some of GPT-NeoX's files build
# another one
PUBLISHED_WIDTHS = {
    (4096, 32, 32): ("Llama 7B, Code Llama 7B and Llemma 7B", 11008),
    (4096, 32, 8): ("Mistral 7B and Llama 3 8B", 14336),
    (8192, 48, 8): ("Code Llama 34B and Llemma 34B", 22016),
    (8192, 80, 8): ("Llama 2 70B", 28672),
}


def renamed(work: Translation) -> None:
    """Copy renamed keys, including GPT-NeoX's defaults."""
    for name, rule in GPT_NEOX_KEYS.items():
        value = work.given[name].value if name in work.given else rule.default
        if rule.kind == "renamed" and value is not None:
            work.set(rule.to[0], value, name)


def residual(work: Translation) -> None:
    """Translate the shared norm of both branches, and tied embeddings."""
    shared = work.value("gpt_j_tied")
    if shared and not work.value("gpt_j_residual"):
        work.note("no effect without gpt_j_residual, as in GPT-NeoX", "gpt_j_tied")
        shared = False
    work.set("model.shared_residual_norm", shared, "gpt_j_tied")
    if work.value("gpt_j_residual") and not work.value("use_bias_in_mlp"):
        work.refuse(
            "gpt_j_residual",
            NO_ATTENTION,
            want="use_bias_in_mlp: true, or gpt_j_residual: false",
            do="--set model.parallel_residual=true trains the model with attention, unlike GPT-NeoX",
            decides="model.parallel_residual",
        )
    work.set("model.tie_embeddings", not work.value("no_weight_tying"), "no_weight_tying")


def initialisation(work: Translation) -> None:
    """Translate the initialisation methods that both projects have."""
    for name, key in (("init_method", "model.init"), ("output_layer_init_method", "model.output_init")):
        if work.value(name) in INITS:
            work.set(key, work.value(name), name)
        else:
            work.refuse(
                name, "initialisation is not supported", want=", ".join(INITS), do=f"--set {key}=...", decides=key
            )


def norm(work: Translation) -> None:
    """Translate the type, epsilon and bias of norms."""
    kind = str(work.value("norm")).lower().removeprefix("te_")
    if kind not in ("layernorm", "rmsnorm"):
        work.refuse("norm", "norm is not supported", want="layernorm or rmsnorm")
        return
    eps = "layernorm_epsilon" if kind == "layernorm" else "rms_norm_epsilon"
    work.set("model.norm", kind, "norm")
    work.set("model.norm_eps", work.value(eps), eps)
    if kind == "layernorm" and not work.value("use_bias_in_norms"):
        work.refuse("use_bias_in_norms", "layernorm without a bias is not supported", want="true, or norm: rmsnorm")


def activation(work: Translation) -> None:
    """Translate the activation. GPT-NeoX's fused bias-GeLU is the tanh form, its unfused GeLU the erf form."""
    name = str(work.value("activation")).lower()
    if name == "gelu":
        fused = bool(work.value("bias_gelu_fusion")) and not work.value("onnx_safe")
        work.set("model.activation", "gelu_tanh" if fused else "gelu", "bias_gelu_fusion" if fused else "activation")
        if fused:
            work.note(
                "GPT-NeoX's fused kernel computes the tanh form of GeLU: model.activation: gelu_tanh",
                "bias_gelu_fusion",
            )
    elif name in ACTIVATIONS:
        work.set("model.activation", ACTIVATIONS[name], "activation")
    else:
        work.refuse("activation", "activation is not supported", want=", ".join(("gelu", *ACTIVATIONS)))


def width(work: Translation) -> None:
    """Compute the width of the MLP.

    For a gated MLP GPT-NeoX takes 2/3 of intermediate_size, rounded up to 2 x mlp_multiple_of; half of that is the
    width.
    """
    name = work.first("intermediate_size", "expansion_factor")
    if "intermediate_size" in work.given and "expansion_factor" in work.given:
        work.refuse(
            "expansion_factor",
            "MLP width is given twice",
            want="intermediate_size or expansion_factor",
            decides="model.intermediate_size",
        )
    hidden, multiple, given = work.number("hidden_size"), work.number("mlp_multiple_of"), work.number(name)
    if not hidden or not multiple:
        return
    size = 4 * hidden if given is None else int(given * hidden) if name == "expansion_factor" else int(given)
    if ACTIVATIONS.get(str(work.value("activation")).lower()) not in GATED:
        inner, outer = -(-size // (2 * multiple)) * 2 * multiple, -(-size // multiple) * multiple
        _set_width(work, name, inner, outer, size)
        return
    both = int(size * 2 / 3)
    inner, outer = -(-both // (2 * multiple)) * multiple, -(-(both // 2) // multiple) * multiple
    _set_width(work, name, inner, outer, size)
    if inner == outer:
        work.note(
            f"gated: GPT-NeoX computes a width of {outer} from {size} (a third, rounded up to mlp_multiple_of "
            f"{multiple})",
            name,
        )
        heads = work.number("num_kv_heads") or work.number("num_attention_heads")
        real_name, real = PUBLISHED_WIDTHS.get((hidden, work.number("num_layers"), heads), ("", outer))
        if real != outer:
            work.note(
                f"this file does not describe {real_name}, whose width is {real}: set intermediate_size: {3 * real} "
                "for that model",
                name,
            )


def _set_width(work: Translation, name: str, inner: int, outer: int, size: int) -> None:
    if inner == outer:
        work.set("model.intermediate_size", outer, name)
        return
    what = f"invalid file: GPT-NeoX gives the two MLP matrices different widths, {inner} and {outer}"
    if name not in work.given:
        name = "hidden_size"
    do = f"intermediate_size: {3 * size} for a gated width of {size}, or --set model.intermediate_size={size}"
    work.refuse(name, what, want="one width for both", do=do, decides="model.intermediate_size")


def positions(work: Translation) -> None:
    """Translate the position embedding. Rotary options apply to rotary positions only."""
    kind = work.value("pos_emb")
    if kind not in ("rotary", "learned", "alibi", "none"):
        work.refuse(
            "pos_emb",
            "position embedding is not supported",
            want="rotary, learned, alibi or none",
            decides="model.position_embedding",
        )
        return
    work.set("model.position_embedding", kind, "pos_emb")
    if kind == "rotary":
        work.set("model.rotary_pct", work.value("rotary_pct"), "rotary_pct")
        work.set("model.rope_theta", work.value("rotary_emb_base"), "rotary_emb_base")


def attention(work: Translation) -> None:
    """Translate the attention, which must be dense in every layer.

    A window of GPT-NeoX has one key more than its width.
    """
    layers = work.value("num_layers")
    kinds: list[YamlValue] = ["global"] * layers if isinstance(layers, int) else []
    if "attention_config" in work.given:
        try:
            kinds = expand(work.value("attention_config"), layers)
        except ValueError as reason:
            work.refuse("attention_config", "cannot parse the attention types", want=str(reason))
    other = sorted({str(kind) for kind in kinds} - {"global", "flash"})
    if other:
        work.refuse(
            "attention_config", f"attention is not supported: {', '.join(other)}", want="global or flash in every layer"
        )
    elif isinstance(layers, int) and len(kinds) != layers:
        work.refuse(
            "attention_config",
            "invalid file: attention types do not match the layers",
            want=f"{layers} types; the list has {len(kinds)}",
            decides="model.num_layers",
        )
    for bias in ("qkv_bias", "attention_out_bias"):
        work.set(f"model.{bias}", work.value("use_bias_in_attn_linear"), "use_bias_in_attn_linear")
    window = work.number("sliding_window_width")
    if window is not None and work.number("pipe_parallel_size") == 0 and "global" in kinds:
        work.refuse(
            "sliding_window_width",
            "with pipe_parallel_size: 0 GPT-NeoX ignores the window of global attention",
            want="pipe_parallel_size: 1, flash attention, or no sliding_window_width",
            do=f"--set model.sliding_window={window + 1} trains with the window, unlike GPT-NeoX; =null trains "
            "without, like GPT-NeoX",
            decides="model.sliding_window",
        )
    elif window is not None:
        work.set("model.sliding_window", window + 1, "sliding_window_width")
        work.note(
            f"a window of {window} in GPT-NeoX has {window + 1} keys, the query itself included: model.sliding_window: "
            f"{window + 1}",
            "sliding_window_width",
        )


def expand(config: YamlValue, layers: YamlValue) -> list[str]:
    """Expand `[[["local", "global"], 6], ...]` to one type per layer. "all" repeats up to the last layer.

    Raises:
        ValueError: the list has another form.
    """
    want = "[[[type, ...], times], ...], times a number or all"
    kinds: list[str] = []
    if not isinstance(config, list):
        raise ValueError(want)
    for item in config:
        if isinstance(item, str):
            kinds.append(item)
            continue
        if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], list) or not item[0]:
            raise ValueError(want)
        names, times = item
        if times == "all":
            times = max(layers - len(kinds), 0) // len(names) if isinstance(layers, int) else 0
        if not isinstance(times, int):
            raise ValueError(want)
        kinds += names * times
    return kinds


def vocabulary(work: Translation) -> None:
    """Compute the vocabulary size.

    GPT-NeoX pads the ids of the tokenizer to a multiple of make_vocab_size_divisible_by x model_parallel_size. The rows
    of a checkpoint, if known, take precedence, unless the tokenizer of the file has more ids.
    """
    kind = str(work.value("tokenizer_type")).lower()
    file = work.value("vocab_file")
    if ("tokenizer", "file") in work.native or ("model", "vocab_size") in work.native:
        return
    ids = None
    if kind == "hftokenizer" and file is not None:
        try:
            ids = tokenizer_vocab_size(str(file))
            work.set("tokenizer.file", file, "vocab_file")
        except (OSError, ValueError):
            if Path(str(file)).name == "20B_tokenizer.json":
                ids = NEOX_20B_IDS
                work.note(
                    "file not found; assumed to be the tokenizer of GPT-NeoX-20B. Generation from text needs "
                    "tokenizer.file",
                    "vocab_file",
                )
    elif kind in ("gpt2bpetokenizer", "hfgpt2tokenizer"):
        ids = GPT2_IDS
        given = "is" if "tokenizer_type" in work.given else "is by default"
        work.note(
            f"tokenizer_type {given} {work.value('tokenizer_type')}: {ids} ids; set tokenizer.file to generate from "
            "text, or to use another tokenizer"
        )
    rows, named = work.embedding_rows, "tokenizer_type" in work.given or "vocab_file" in work.given
    if rows is not None and (ids is None or not named or ids <= rows):
        work.set("model.vocab_size", rows, work.first("vocab_file", "tokenizer_type"))
        work.note(f"model.vocab_size: {rows}, the embedding rows of the checkpoint")
        return
    multiple, tensor = work.number("make_vocab_size_divisible_by"), work.number("model_parallel_size")
    if ids is None or not multiple:
        name = work.first("vocab_file", "tokenizer_type")
        work.refuse(
            name,
            "vocabulary size is unknown",
            want="vocab_file: a `tokenizers` JSON file",
            do="--set model.vocab_size=... or tokenizer.file=...",
        )
        return
    multiple *= max(tensor or 1, 1)
    padded = -(-ids // multiple) * multiple
    work.set("model.vocab_size", padded, work.first("vocab_file", "tokenizer_type"))
    if padded != ids:
        work.note(
            f"model.vocab_size: {padded}, the {ids} ids padded to a multiple of {multiple}, as in the weights of "
            "GPT-NeoX"
        )


STEPS = (renamed, residual, initialisation, norm, activation, width, positions, attention, vocabulary)
