"""The model of megatron-core, a peer of bench_account.py, where its package is installed.

Its local specification: layers of torch, no Transformer Engine, and what it lets torch.compile fuse runs unfused. Its
attention forms all scores, as transformers' eager one does. It has no parallel residual: Pythia's blocks are
sequential.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from neox.config.schema import ModelConfig


def installed() -> bool:
    """Whether there is a megatron-core to compare with."""
    try:
        return importlib.util.find_spec("megatron.core") is not None
    except ModuleNotFoundError:
        return False


def megatron_model(
    model: ModelConfig, length: int
) -> tuple[torch.nn.Module, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """megatron-core's model of the same shape on the fake GPU, and its mean loss of (tokens, targets)."""
    from megatron.core import jit, parallel_state

    jit.disable_jit_fuser()  # before the modules that it decorates
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    norm = "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm"
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        ffn_hidden_size=model.intermediate_size,
        normalization=norm,
        gated_linear_unit=model.gated,
        activation_func=torch.nn.functional.silu if model.gated else torch.nn.functional.gelu,
        add_bias_linear=not model.gated,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        persist_layer_norm=False,
    )
    theirs = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=norm),
        model.vocab_size,
        length,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_percent=model.rotary_pct,
        rotary_base=int(model.rope_theta),
    )
    theirs = theirs.to("cuda", torch.bfloat16).train()
    positions = torch.arange(length, device="cuda").unsqueeze(0)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda").triu(1)

    def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with mock.patch("torch.cuda.current_device", lambda: 0):
            return theirs(tokens, positions.expand_as(tokens), mask, labels=targets).float().mean()

    return theirs, loss
