"""Small GPT-NeoX files for tests, and the parameter shapes that GPT-NeoX computes from them."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "rotary_pct": 0.5,
    "no_weight_tying": True,
    "train_micro_batch_size_per_gpu": 4,
    "train_iters": 1000,
    "tokenizer_type": "HFTokenizer",
    "vocab_file": "20B_tokenizer.json",
}


def flow_text(values: dict[str, Any], dash: bool = False) -> str:
    """Write values in the style of GPT-NeoX: one flow mapping with quoted keys, Python booleans and a trailing
    comma.
    """
    lines = [f'  "{key.replace("_", "-") if dash else key}": {flow(value)},  # {key}' for key, value in values.items()]
    return "\n".join(["# a file of GPT-NeoX", "{", *lines, "}", ""])


def flow(value: Any) -> str:
    """One value in flow style."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}": {flow(inner)}' for key, inner in value.items()) + ",}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def gpt_neox_shapes(values: dict[str, Any], vocab_size: int) -> list[tuple[int, ...]]:
    """Shapes of all parameters that GPT-NeoX builds from a flat file, sorted; its formulas, not ours.

    Its gated MLP is one matrix of both halves, which is two of ours; the vocabulary is the padded one.
    """

    def get(name: str, default: Any) -> Any:
        return values.get(name, values.get(name.replace("_", "-"), default))

    hidden, layers, heads = get("hidden_size", None), get("num_layers", None), get("num_attention_heads", None)
    keys = get("num_kv_heads", None) or heads
    multiple = get("mlp_multiple_of", 1)
    gated = get("activation", "gelu") in ("swiglu", "geglu", "reglu")
    ffn = get("intermediate_size", None) or 4 * hidden
    inner = ffn
    if gated:
        ffn = int(ffn * 2 / 3)
        inner = ffn // 2
    ffn = 2 * multiple * ((ffn + 2 * multiple - 1) // (2 * multiple))
    inner = multiple * ((inner + multiple - 1) // multiple)
    norm = [(hidden,)] if get("norm", "layernorm") == "rmsnorm" else [(hidden,), (hidden,)]
    rows = hidden + 2 * keys * (hidden // heads)
    block = [(rows, hidden), (hidden, hidden), (hidden, inner)]
    block += [(ffn // 2, hidden), (ffn // 2, hidden)] if gated else [(ffn, hidden)]
    if get("use_bias_in_attn_linear", True):
        block += [(rows,), (hidden,)]
    if get("use_bias_in_mlp", True):
        block += [(hidden,)] + ([(ffn // 2,), (ffn // 2,)] if gated else [(ffn,)])
    block += norm * (1 if get("gpt_j_residual", False) and get("gpt_j_tied", False) else 2)
    reward = get("train_impl", "normal") == "rm"
    tables = 1 if reward or not get("no_weight_tying", False) else 2
    shapes = block * layers + norm + [(vocab_size, hidden)] * tables + ([(1, hidden)] if reward else [])
    if get("pos_emb", "learned") == "learned":
        shapes.append((get("max_position_embeddings", None), hidden))
    return sorted(shapes)
