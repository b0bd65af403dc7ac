"""Checkpoints as GPT-NeoX writes them, cut from a model's weights by its own rules (written from its layer classes,
not from our reader).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from neox.config.schema import ModelConfig

State = dict[str, torch.Tensor]
SHARES = (2, -1, 1, -1)  # of a bias that every rank adds its own part of: exact in any dtype, and their sum is the bias


def layers_of_rank(
    weights: Mapping[str, torch.Tensor], config: ModelConfig, tp: int, rank: int, *, padded_rows: int, old_names: bool
) -> dict[int, State]:
    """Layer number -> parameters that tensor rank `rank` of `tp` holds."""
    norm_kind = ("weight", "bias") if config.norm == "layernorm" else ("weight",)
    scale = {"weight": "weight" if config.norm == "layernorm" else "scale", "bias": "bias"}

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x.chunk(tp, dim=0)[rank].clone()

    def columns(x: torch.Tensor) -> torch.Tensor:
        return x.chunk(tp, dim=1)[rank].clone()

    def vocabulary(x: torch.Tensor) -> torch.Tensor:
        return rows(torch.cat([x, x.new_full((padded_rows - x.shape[0], x.shape[1]), 7.0)]))

    def norm(ours: str, theirs: str) -> State:
        return {f"{theirs}.{scale[kind]}": weights[f"{ours}.{kind}"] for kind in norm_kind}

    def row_bias(x: torch.Tensor) -> torch.Tensor:
        return x * SHARES[rank] if config.parallel_residual and tp > 1 else x

    layers = {0: {"word_embeddings.weight": vocabulary(weights["embedding.word.weight"])}}
    if config.position_embedding == "learned":
        layers[0]["position_embeddings.weight"] = weights["embedding.position.weight"]
    into, out = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h") if old_names else ("mlp.linear1", "mlp.linear2")
    for i in range(config.num_layers):
        ours = f"layers.{i}"
        # GPT-NeoX stores one that it does not apply
        second = f"{ours}.norm1" if config.shared_residual_norm else f"{ours}.norm2"
        state = norm(f"{ours}.norm1", "input_layernorm") | norm(second, "post_attention_layernorm")
        if config.position_embedding == "alibi":
            state["attention.alibi_embed.slopes"] = torch.tensor(
                [2.0 ** (-8.0 * (head + 1) / config.num_attention_heads) for head in range(config.num_attention_heads)]
            ).chunk(tp)[rank]
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            state[f"attention.query_key_value.{kind}"] = packed(
                weights[f"{ours}.attention.qkv.{kind}"], config, tp, rank
            )
        state["attention.dense.weight"] = columns(weights[f"{ours}.attention.out.weight"])
        state["mlp_down"] = columns(weights[f"{ours}.mlp.down.weight"])
        state[f"{out}.weight"] = state.pop("mlp_down")
        if config.attention_out_bias:
            state["attention.dense.bias"] = row_bias(weights[f"{ours}.attention.out.bias"])
        for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
            up = rows(weights[f"{ours}.mlp.up.{kind}"])
            state[f"{into}.{kind}"] = torch.cat([up, rows(weights[f"{ours}.mlp.gate.{kind}"])]) if config.gated else up
        if config.mlp_bias:
            state[f"{out}.bias"] = row_bias(weights[f"{ours}.mlp.down.bias"])
        state["attention.rotary_emb.inv_freq"] = torch.ones(3)
        layers[i + 2] = state
    layers[config.num_layers + 3] = norm("norm", "norm")
    if not config.tie_embeddings:
        layers[config.num_layers + 4] = {"final_linear.weight": vocabulary(weights["head.weight"])}
    return layers


def packed(x: torch.Tensor, config: ModelConfig, tp: int, rank: int) -> torch.Tensor:
    """[n/tp, 3, d] interleaved without groups; all queries, all keys, all values of the rank with groups."""
    groups, d = config.num_kv_heads, config.head_dim
    if groups == config.num_attention_heads:
        return x.chunk(tp, dim=0)[rank].clone()
    heads = [
        x[(g * (config.num_attention_heads // groups + 2) + j) * d :][:d]
        for g in range(groups)
        for j in range(config.num_attention_heads // groups + 2)
    ]
    per = config.num_attention_heads // groups + 2
    mine = range(rank * groups // tp, (rank + 1) * groups // tp)
    queries = [heads[g * per + j] for g in mine for j in range(per - 2)]
    keys, values = [heads[g * per + per - 2] for g in mine], [heads[g * per + per - 1] for g in mine]
    return torch.cat([*queries, *keys, *values])


def write_gpt_neox(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    tp: int,
    *,
    by_layer: bool,
    padded_rows: int,
    old_names: bool,
) -> None:
    """Write folder/global_step7 and folder/latest."""
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    for rank in range(tp):
        layers = layers_of_rank(weights, config, tp, rank, padded_rows=padded_rows, old_names=old_names)
        if by_layer:
            for number, state in layers.items():
                torch.save(state, step / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
            torch.save({"module": None, "iteration": 7}, step / f"mp_rank_{rank:02d}_model_states.pt")
        else:
            module = {
                f"sequential.{number}.{name}": tensor
                for number, state in layers.items()
                for name, tensor in state.items()
            }
            torch.save({"module": module, "iteration": 7}, step / f"mp_rank_{rank:02d}_model_states.pt")
