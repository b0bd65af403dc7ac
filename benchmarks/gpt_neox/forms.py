"""The toy models that compare.py trains with GPT-NeoX and with neox: GPT-NeoX's YAML files, the data and the tokenizer.

With two pipeline stages they use ZeRO stage 1, as the files that GPT-NeoX ships do. At stage 0 DeepSpeed's pipeline
engine omits norms and row-parallel biases of all stages but the first from the gradient norm for clipping.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

VOCAB_SIZE = 120
SEQ_LENGTH = 32
STEPS = 20

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": SEQ_LENGTH,
    "max_position_embeddings": SEQ_LENGTH,
    "pipe_parallel_size": 0,
    "model_parallel_size": 1,
    "norm": "layernorm",
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": True,
    "output_layer_parallelism": "column",
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95]}},
    "min_lr": 0.001,
    "lr_decay_style": "cosine",
    "warmup": 0.13,
    "train_iters": STEPS,
    "lr_decay_iters": STEPS,
    "zero_optimization": {"stage": 0},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "hidden_dropout": 0,
    "attention_dropout": 0,
    "data_impl": "mmap",
    "split": "1,0,0",
    "eval_interval": 1000,
    "eval_iters": 0,
    "checkpoint_factor": 1000,
    "extra_save_iters": [0],
    "log_interval": 1,
    "steps_per_print": 1000,
    "distributed_backend": "gloo",
    "make_vocab_size_divisible_by": 8,
    "tokenizer_type": "HFTokenizer",
}
PYTHIA: dict[str, Any] = {"gpt_j_residual": True}
LLAMA: dict[str, Any] = {
    "num_kv_heads": 2,
    "norm": "rmsnorm",
    "rms_norm_epsilon": 0.001,
    "rotary_pct": 1,
    "activation": "swiglu",
    "intermediate_size": 240,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
}
GPT2: dict[str, Any] = {
    "pos_emb": "learned",
    "no_weight_tying": False,
    "bias_gelu_fusion": True,
    "lr_decay_style": "linear",
}
FORMS: dict[str, dict[str, Any]] = {
    **{
        f"pythia-mp{mp}-pp{pp}": PYTHIA
        | {"model_parallel_size": mp, "pipe_parallel_size": pp, "zero_optimization": {"stage": int(pp == 2)}}
        for mp in (1, 2)
        for pp in (0, 1, 2)
    },
    "pythia-mp4-pp0": PYTHIA | {"model_parallel_size": 4},
    "llama-mp2": LLAMA | {"model_parallel_size": 2, "pipe_parallel_size": 1},
    "gpt2": GPT2,
    "gpt2-pp2": GPT2 | {"pipe_parallel_size": 2, "zero_optimization": {"stage": 1}},
    "gptj_tied-mp2": {"gpt_j_residual": True, "gpt_j_tied": True, "rotary_pct": 0.5, "model_parallel_size": 2},
    "alibi-mp2": {"pos_emb": "alibi", "model_parallel_size": 2, "pipe_parallel_size": 1},
    "alibi-6-heads": {"pos_emb": "alibi", "hidden_size": 48, "num_attention_heads": 6},
    "geglu-mp2": {"activation": "geglu", "model_parallel_size": 2, "intermediate_size": 192},
    "geglu-parallel-mp2": {
        "gpt_j_residual": True,
        "activation": "geglu",
        "model_parallel_size": 2,
        "intermediate_size": 192,
    },
    # At pipe_parallel_size 0 GPT-NeoX rebuilds its mask without the window (get_batch_sequential).
    "window": {"sliding_window_width": 7, "lr_decay_style": "linear", "pipe_parallel_size": 1},
}


def processes(form: dict[str, Any]) -> int:
    """Number of processes of a form."""
    return max(form.get("model_parallel_size", 1), 1) * max(form.get("pipe_parallel_size", 0), 1)


def write_form(name: str, folder: Path, data: Path, tokenizer: Path, changes: dict[str, Any]) -> Path:
    """Write a form's YAML file, with which GPT-NeoX saves into `folder`, and return its path."""
    values = (
        BASE
        | FORMS[name]
        | {"data_path": str(data), "vocab_file": str(tokenizer), "save": str(folder / "checkpoints")}
        | changes
    )
    path = folder / f"{name}.yml"
    path.write_text(json.dumps(values, indent=1))
    return path


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer of VOCAB_SIZE words."""
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, VOCAB_SIZE)}
    special = {
        "id": 0,
        "content": "<|endoftext|>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<|endoftext|>"},
    }
    path.write_text(json.dumps(content))


def documents() -> list[list[int]]:
    """Documents that a model can learn: at 70 % of the positions the next id is a function of the previous one."""
    rng = random.Random(0)
    generated = []
    for _ in range(60):
        document = [rng.randrange(1, VOCAB_SIZE)]
        for _ in range(rng.randrange(20, 120)):
            document.append(
                rng.randrange(1, VOCAB_SIZE) if rng.random() < 0.3 else document[-1] * 7 % (VOCAB_SIZE - 1) + 1
            )
        generated.append([*document, 0])
    return generated


def probe_tokens() -> list[list[int]]:
    """The two sequences on which logits are compared."""
    return [[(i * 7 + row * 13) % (VOCAB_SIZE - 1) + 1 for i in range(SEQ_LENGTH)] for row in range(2)]
