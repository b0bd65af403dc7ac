"""Entry of each of two processes: tensor-parallel models against models on one process, from the same seed."""

from __future__ import annotations

import torch
import torch.distributed as dist

from neox.config.schema import ModelConfig
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh, create_mesh

COMMON = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 77,
    "vocab_multiple": 8,
    "max_position_embeddings": 32,
    "init_std": 0.3,
}
MODELS = {
    "neox": {"parallel_residual": True, "rotary_pct": 0.5},
    "gpt2": {"position_embedding": "learned", "tie_embeddings": True},
    "llama": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "num_kv_heads": 2,
        "qkv_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    "alibi": {"position_embedding": "alibi", "parallel_residual": True, "shared_residual_norm": True, "qk_norm": True},
    "adapters": {"parallel_residual": True, "rotary_pct": 0.5, "lora": {"rank": 3, "alpha": 6.0}},
    "gated adapters": {
        "activation": "swiglu",
        "lora": {"rank": 2, "alpha": 2.0, "targets": ["mlp.gate", "mlp.down"]},
        "output": "score",
    },
}


def close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    error = (got - want).abs().max().item()
    scale = max(want.abs().max().item(), 1e-3)
    if not error <= 1e-5 * scale:
        raise AssertionError(f"{what}: error {error} at scale {scale}")


def models() -> None:
    """Initial weights, logits, losses and gradients equal those of one process."""
    dist.init_process_group("gloo")
    for sequence in (False, True):
        compare(create_mesh(tensor=2, sequence=sequence))
    context()
    dist.destroy_process_group()


def compare(mesh: Mesh) -> None:
    """Every model on this mesh against the one on one process."""
    tokens = torch.randint(77, (2, 18 if mesh.sequence else 19), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, 1)
    targets[0, 3] = -100
    for name, options in MODELS.items():
        config = ModelConfig(**COMMON, **options)
        single, sharded = GPT(config, Mesh.single()), GPT(config, mesh)
        if sharded.num_parameters() != single.num_parameters() or sharded.flops_per_token(19) != single.flops_per_token(
            19
        ):
            raise AssertionError(f"{name}: counts depend on the layout")
        for (key, want), (_, got) in zip(single.logical_weights(), sharded.logical_weights(), strict=True):
            if not torch.equal(got, want):
                raise AssertionError(f"{name}: initial {key} depends on the layout")
        weights = {
            key: weight + 0.1 if key.endswith("bias") else weight.clone() for key, weight in single.logical_weights()
        }
        draws = torch.Generator().manual_seed(2)
        # zero at first
        weights |= {
            key: torch.randn(weight.shape, generator=draws) * 0.3
            for key, weight in weights.items()
            if key.endswith("lora_b")
        }
        for model in (single, sharded):  # biases that are added twice or not at all must show
            model.load_weights(weights)
        close(sharded(tokens), single(tokens), f"{name}: logits")
        ids = torch.arange(tokens.shape[1]).flip(0).expand_as(tokens)
        close(sharded(tokens, position_ids=ids), single(tokens, position_ids=ids), f"{name}: logits of positions")
        losses = [model(tokens, targets) for model in (single, sharded)]
        close(losses[1], losses[0], f"{name}: losses")
        for loss in losses:
            loss.sum().backward()
        gradients = {key: parameter.grad for key, parameter in single.named_parameters()}
        specs = sharded.shard_specs()
        for key, parameter in sharded.named_parameters():
            if not parameter.requires_grad:
                continue
            close(specs[key].unpad(parameter.grad), specs[key].take(gradients[key]), f"{name}: gradient of {key}")


def context() -> None:
    """Each of two processes has half of the sequence: its logits, and the sum of the gradients."""
    mesh = create_mesh(context=2)
    tokens = torch.randint(77, (2, 18), generator=torch.Generator().manual_seed(1))
    targets, mine = tokens.roll(-1, 1), slice(9 * mesh.cp_rank, 9 * mesh.cp_rank + 9)
    segments = (torch.arange(18) >= 7).int().expand(2, 18)
    for name, options in MODELS.items():
        config = ModelConfig(**COMMON, **options)
        single, part = GPT(config, Mesh.single()), GPT(config, mesh)
        for documents in (None, segments):
            want = single(tokens, segment_ids=documents)[:, mine]
            close(part(tokens[:, mine], segment_ids=documents), want, f"{name}: logits of a part of the sequence")
        single(tokens, targets).sum().backward()
        part(tokens[:, mine], targets[:, mine]).sum().backward()
        for (key, want), (_, got) in zip(single.named_parameters(), part.named_parameters(), strict=True):
            if got.requires_grad:
                dist.all_reduce(got.grad)
                close(got.grad, want.grad, f"{name}: gradient of {key}, context")
