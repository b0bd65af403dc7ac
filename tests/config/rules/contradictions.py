"""Keys that are valid alone and contradict each other: the cases of test_rules.py.

`python -m tests.config.rules.contradictions` prints the errors of each case. test_rules.py compares the output with
that of `python -O`.
"""

from __future__ import annotations

from dataclasses import dataclass

from neox.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_KEYS, REMOVED_KEYS
from neox.config.load import load_config
from neox.config.validate import validate
from neox.errors import ConfigError

BASE = (
    "model.vocab_size=100",
    "model.hidden_size=96",
    "model.num_attention_heads=12",
    "model.num_layers=2",
    "model.max_position_embeddings=64",
    "data.seq_length=64",
    "data.train=[corpus]",
    "train.micro_batch_size=1",
    "train.train_iters=100",
)


@dataclass(frozen=True)
class Case:
    """Overrides that contradict each other, and the keys that the error must name."""

    overrides: tuple[str, ...]
    keys: tuple[str, ...]
    world_size: int = 1
    device: str = "cpu"


def shape_cases() -> list[Case]:
    """Contradictions between widths and heads."""
    cases = [
        Case(
            (f"model.hidden_size={hidden}", f"model.num_attention_heads={heads}"),
            ("model.hidden_size", "model.num_attention_heads"),
        )
        for hidden in (96, 100, 128, 130)
        for heads in (3, 5, 6, 7, 9, 11, 12)
        if hidden % heads
    ]
    cases += [
        Case(
            (f"model.num_attention_heads={heads}", f"model.num_kv_heads={kv}"),
            ("model.num_attention_heads", "model.num_kv_heads"),
        )
        for heads in (2, 4, 6, 8, 12)
        for kv in (3, 5, 8, 24)
        if heads % kv
    ]
    cases += [
        Case(
            (f"model.head_dim={width}", f"model.attention_backend={backend}"),
            ("model.head_dim", "model.attention_backend"),
        )
        for width in (258, 512)
        for backend in ("auto", "native")
    ]
    cases += [
        Case((f"model.head_dim={width}", f"model.rotary_pct={share}"), ("model.head_dim", "model.rotary_pct"))
        for width, share in ((9, 1.0), (20, 0.25), (8, 0.1), (4, 0.4))
    ]
    cases += [
        Case(
            ("model.attention_backend=hopper", "model.head_dim=64", f"model.{option}"),
            (f"model.{option.partition('=')[0]}", "model.attention_backend"),
        )
        for option in ("head_dim=80", "attention_softcap=30", "attention_dropout=0.1", "position_embedding=alibi")
    ]
    backend, hopper = "model.attention_backend", ("model.attention_backend=hopper", "model.head_dim=64")
    native, softcap = ("model.attention_backend=native",), ("model.attention_softcap=30",)
    cases.append(Case(hopper, (backend,)))
    cases += [
        Case((*overrides, "precision.dtype=fp32"), (overrides[0].partition("=")[0], "precision.dtype"), device="cuda")
        for overrides in (hopper, native, softcap, (*softcap, *native))
    ]
    return cases


def model_cases() -> list[Case]:
    """Contradictions inside the model."""
    cases = shape_cases()
    for position in ("learned", "alibi", "none"):
        for option in ("rotary_pct=0.5", "rope_theta=500000", "rope_scaling={type: linear, factor: 2}"):
            cases.append(
                Case(
                    (f"model.position_embedding={position}", f"model.{option}"),
                    (f"model.{option.partition('=')[0]}", "model.position_embedding"),
                )
            )
    for position in ("rotary", "learned"):
        for length in (65, 128, 100000):
            cases.append(
                Case(
                    (f"model.position_embedding={position}", f"data.seq_length={length}"),
                    ("data.seq_length", "model.max_position_embeddings"),
                )
            )
    cases += [
        Case(
            ("model.attention_softcap=30", "model.attention_backend=sdpa"),
            ("model.attention_softcap", "model.attention_backend"),
        ),
        Case(("optimizer.row_bias_lr_multiplier=2",), ("optimizer.row_bias_lr_multiplier", "model.parallel_residual")),
        Case(
            (
                "optimizer.row_bias_lr_multiplier=2",
                "model.parallel_residual=true",
                "model.attention_out_bias=false",
                "model.mlp_bias=false",
            ),
            ("optimizer.row_bias_lr_multiplier", "model.mlp_bias"),
        ),
        Case(("model.shared_residual_norm=true",), ("model.shared_residual_norm", "model.parallel_residual")),
        Case(
            ("model.rope_scaling={type: yarn, factor: 4}",),
            ("model.rope_scaling.type", "model.rope_scaling.original_max_position_embeddings"),
        ),
        Case(
            ("model.rope_scaling={type: llama3, factor: 4}",),
            ("model.rope_scaling.type", "model.rope_scaling.original_max_position_embeddings"),
        ),
        Case(("model.rope_scaling={type: ntk, factor: 0.5}",), ("model.rope_scaling.factor",)),
        Case(
            ("model.rope_scaling={type: llama3, factor: 4, original_max_position_embeddings: 64, low_freq_factor: 4}",),
            ("model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor"),
        ),
        Case(
            ("model.rope_scaling={type: yarn, factor: 4, original_max_position_embeddings: 64, beta_slow: 32}",),
            ("model.rope_scaling.beta_slow", "model.rope_scaling.beta_fast"),
        ),
        Case(("model.lora={rank: 2, targets: [mlp.gate]}",), ("model.lora.targets", "model.activation")),
        Case(("model.lora={rank: 769}",), ("model.lora.rank", "model.hidden_size")),
        Case(("tokenizer.file=no-such-tokenizer.json",), ("tokenizer.file",)),
    ]
    return cases


def data_cases() -> list[Case]:
    """Contradictions about data and evaluation."""
    cases = [
        Case(
            ("data.path=x", f"data.{part}=[y]", "data.train=[]") if part != "train" else ("data.path=x",),
            ("data.path", f"data.{part}"),
        )
        for part in ("train", "validation", "test")
    ]
    cases += [
        Case((f"data.{part}=[{{path: a, weight: 0}}, {{path: b, weight: 0}}]",), (f"data.{part}",))
        for part in ("train", "validation", "test")
    ]
    cases += [Case(("data.split='0,1,1'",), ("data.split",))]
    cases += [
        Case(
            ("data.train=[]", f"data.path={path}", f"data.split='{split}'", "evaluate.interval=5"),
            ("evaluate.interval", "data.validation", "data.split"),
        )
        for path in "xy"
        for split in ("1", "99,0,1")
    ]
    cases += [
        Case(("data.train=[]",), ("data.train", "data.path", "data.text")),
        Case(("data.text=[a.txt]", "tokenizer.file=null"), ("data.text", "data.train")),
        Case(("data.text=[a.txt]", "data.train=[]", "data.path=x"), ("data.path", "data.text")),
        Case(("data.text=[a.txt]", "data.train=[]"), ("data.text", "tokenizer.file")),
        Case(
            ("data.text=[a.txt]", "data.train=[]", "data.split='1'", "evaluate.interval=5"),
            ("evaluate.interval", "data.validation", "data.split"),
        ),
        Case(("data.text=[a.txt]", "data.train=[]", "train.objective=sft"), ("train.objective", "data.text")),
        Case(("data.packing=best_fit", "data.order=neox"), ("data.packing", "data.order")),
        Case(("data.packing=best_fit", "train.objective=dpo"), ("data.packing", "train.objective")),
        Case(("data.fim.rate=0.5",), ("data.fim.rate", "tokenizer.file")),
        Case(("data.fim.rate=0.5", "train.objective=sft"), ("data.fim.rate", "train.objective")),
        Case(
            ("data.fim.rate=0.5", "data.fim.middle_token=x", "data.fim.prefix_token=x"),
            ("data.fim.prefix_token", "data.fim.middle_token"),
        ),
        Case(("data.train=['']",), ("data.train",)),
        Case(("evaluate.interval=5",), ("evaluate.interval", "data.validation")),
        Case(("run.dir=' '",), ("run.dir",)),
        Case(("checkpoint.resume=''",), ("checkpoint.resume",)),
        Case(("run.dir=pyproject.toml",), ("run.dir",)),
        Case(("run.dir=/",), ("run.dir",)),
    ]
    return cases


def schedule_cases() -> list[Case]:
    """Contradictions of learning rates, lengths and number formats."""
    cases = [
        Case(
            (f"schedule.warmup_iters={warmup}", f"train.train_iters={length}"),
            ("schedule.warmup_iters", "train.train_iters"),
        )
        for warmup in (11, 200)
        for length in (1, 10)
    ]
    cases += [
        Case(
            (f"schedule.warmup_iters={warmup}", f"schedule.decay_iters={length}"),
            ("schedule.warmup_iters", "schedule.decay_iters"),
        )
        for warmup in (11, 200)
        for length in (1, 10)
    ]
    cases += [
        Case((f"schedule.min_lr={low}", f"optimizer.lr={high}"), ("schedule.min_lr", "optimizer.lr"))
        for low, high in ((1e-3, 1e-4), (1, 0.5), (6.1e-4, 6e-4))
    ]
    cases += [
        Case((f"schedule.type={kind}", "schedule.cooldown_iters=5"), ("schedule.cooldown_iters", "schedule.type"))
        for kind in ("constant", "linear", "cosine", "inverse_sqrt")
    ]
    cases += [
        Case(("schedule.type=wsd",), ("schedule.type", "schedule.cooldown_iters")),
        Case(
            ("schedule.type=wsd", "schedule.warmup_iters=60", "schedule.cooldown_iters=60"),
            ("schedule.warmup_iters", "schedule.cooldown_iters", "train.train_iters"),
        ),
        Case(("schedule.type=constant", "schedule.min_lr=1e-5"), ("schedule.min_lr", "schedule.type")),
        Case(("schedule.rule=gpt_neox", "schedule.type=inverse_sqrt"), ("schedule.rule", "schedule.type")),
        Case(("schedule.warmup_iters=0.01",), ("schedule.warmup_iters", "schedule.rule")),
        Case(("precision.dtype=fp16",), ("precision.dtype",)),
        Case(
            ("precision.min_loss_scale=4", "precision.initial_scale_power=1"),
            ("precision.min_loss_scale", "precision.initial_scale_power"),
            device="cuda",
        ),
    ]
    return cases


def batch_cases() -> list[Case]:
    """Batch sizes that are inconsistent."""
    keys = ("train.micro_batch_size", "train.gradient_accumulation", "train.global_batch_size")
    cases = [
        Case(
            (
                f"train.micro_batch_size={micro}",
                f"train.gradient_accumulation={steps}",
                f"train.global_batch_size={total}",
            ),
            keys,
            world_size=world,
        )
        for micro in (1, 2, 3)
        for steps in (1, 4)
        for total in (5, 7, 25)
        for world in (1, 2)
        if micro * steps * world != total
    ]
    cases += [
        Case(("train.micro_batch_size=4", f"train.global_batch_size={total}"), (keys[0], keys[2]), world_size=2)
        for total in (4, 9, 12)
    ]
    cases.append(Case(("train.micro_batch_size=null",), (keys[0], keys[2])))
    return cases


def parallel_cases() -> list[Case]:
    """Layouts that do not divide the model or the processes."""
    cases = [
        Case(
            (f"parallel.tensor={tensor}", f"parallel.pipeline={stages}"),
            ("parallel.tensor", "parallel.pipeline"),
            world_size=3,
        )
        for tensor, stages in ((2, 1), (1, 2), (2, 2))
    ]
    cases += [
        Case((f"parallel.tensor={tensor}",), ("model.num_attention_heads", "parallel.tensor"), world_size=tensor)
        for tensor in (5, 7, 8)
    ]
    cases += [
        Case(("parallel.tensor=4", f"model.num_kv_heads={kv}"), ("model.num_kv_heads", "parallel.tensor"), world_size=4)
        for kv in (1, 2, 3, 6)
    ]
    cases += [
        Case(
            ("parallel.tensor=2", "model.intermediate_size=33"),
            ("model.intermediate_size", "parallel.tensor"),
            world_size=2,
        )
    ]
    cases += [
        Case((f"parallel.pipeline={stages}",), ("parallel.pipeline", "model.num_layers"), world_size=stages)
        for stages in (3, 4)
    ]
    cases += [
        Case((f"zero.stage={stage}", "parallel.pipeline=2"), ("zero.stage", "parallel.pipeline"), world_size=2)
        for stage in (2, 3)
    ]
    cases += [
        Case(("parallel.sequence=true",), ("parallel.sequence", "parallel.tensor")),
        Case(
            ("parallel.sequence=true", "parallel.tensor=2", "data.seq_length=63"),
            ("data.seq_length", "parallel.tensor"),
            world_size=2,
        ),
        Case(
            ("parallel.pipeline=2", "parallel.partition=[2]"), ("parallel.partition", "parallel.pipeline"), world_size=2
        ),
        Case(
            ("parallel.pipeline=2", "parallel.partition=[2, 1]"),
            ("parallel.partition", "model.num_layers"),
            world_size=2,
        ),
        Case(("parallel.context=2", "model.num_kv_heads=1"), ("model.num_kv_heads", "parallel.context"), world_size=2),
        Case(("parallel.context=2", "data.seq_length=63"), ("data.seq_length", "parallel.context"), world_size=2),
        Case(("parallel.context=2",), ("parallel.tensor", "parallel.pipeline", "parallel.context"), world_size=3),
        Case(("optimizer.type=muon", "parallel.tensor=2"), ("optimizer.type", "parallel.tensor"), world_size=2),
    ]
    return cases


def deepspeed_cases() -> list[Case]:
    """Raw DeepSpeed keys that neox sets, that were removed, are misspelt, or do not apply to the ZeRO stage."""
    cases = [Case((f"deepspeed.{key}=1",), (f"deepspeed.{key}", owner)) for key, owner in OWNED_KEYS.items()]
    cases += [Case((f"deepspeed.{key}=1",), (f"deepspeed.{key}",)) for key in REMOVED_KEYS]
    cases += [Case((f"deepspeed.{key}_x=1",), (f"deepspeed.{key}_x",)) for key in DEEPSPEED_KEYS]
    cases += [
        Case((f"deepspeed.{key}=1",), (f"deepspeed.{key}",))
        for key, inner in DEEPSPEED_KEYS.items()
        if inner and key not in OWNED_KEYS
    ]
    for name, needed in (("offload_optimizer", 1), ("offload_param", 3)):
        for stage in range(needed):
            cases.append(
                Case(
                    (f"deepspeed.zero_optimization.{name}.device=cpu", f"zero.stage={stage}"),
                    (f"deepspeed.zero_optimization.{name}", "zero.stage"),
                )
            )
    cases.append(Case(("deepspeed.comet.api_key=s3cret",), ("deepspeed.comet.api_key",)))
    norm = "deepspeed.zero_optimization.compute_grad_norm"
    for *overrides, key in (
        ("precision.dtype=fp32", "optimizer.gradient_clipping=0", "precision.dtype"),
        ("precision.dtype=bf16", "optimizer.gradient_clipping=1", "optimizer.gradient_clipping"),
        ("precision.dtype=bf16", "optimizer.gradient_clipping=0", "zero.stage=1", "zero.stage"),
        ("precision.dtype=fp16", "optimizer.gradient_clipping=0", "zero.stage=3", "zero.stage"),
    ):
        cases.append(Case((f"{norm}=false", *overrides), (norm, key)))
    return cases


def guard_cases() -> list[Case]:
    """Policies of `guard` without what they require."""
    return [
        Case(("guard.loss_spike=rollback", "data.order=neox"), ("guard.loss_spike", "data.order")),
        Case(
            ("guard.loss_spike=rollback", "checkpoint.save_interval=0"),
            ("guard.loss_spike", "checkpoint.save_interval"),
        ),
    ]


def objective_cases() -> list[Case]:
    """Objectives and adapters without the data, the head or the layout that they require."""
    kind, train, validation = "train.objective", "data.train", "data.validation"
    plain, labelled, pair = ("[{path: a}]", "[{path: a, labels: b}]", "[{path: a, rejected: b}]")
    cases = [Case((f"{kind}={name}", f"{train}={plain}"), (kind, train)) for name in ("sft", "dpo", "reward")]
    cases += [Case((f"{kind}={name}", f"{train}={pair}"), (kind, train)) for name in ("pretrain", "sft")]
    cases += [
        Case((f"{train}={labelled}",), (kind, train)),
        Case((f"{kind}=sft", f"{train}={labelled}", f"{validation}={plain}"), (kind, validation)),
        Case((f"{kind}=dpo", f"{train}={pair}", f"{validation}={plain}"), (kind, validation)),
        *(
            Case((f"{kind}=dpo", f"{part}=[{{path: a, rejected: b, {labels}: c}}]", *more), (kind, part))
            for labels in ("labels", "rejected_labels")
            for part, more in ((train, ()), (validation, (f"{train}={pair}",)))
        ),
        *(
            Case(
                (f"{kind}=sft", f"{train}={labelled}", f"{part}=[{{path: a, labels: b, rejected_labels: c}}]"), (part,)
            )
            for part in (train, validation, "data.test")
        ),
        Case((f"{kind}=sft", f"{train}=[]", "data.path=x"), (kind, "data.path")),
        Case((f"{kind}=reward", f"{train}={pair}"), ("model.output", kind)),
        Case(("model.output=score",), ("model.output", kind)),
        Case((f"{kind}=dpo", f"{train}={pair}", "parallel.context=2"), (kind, "parallel.context"), world_size=2),
        Case(
            (f"{kind}=reward", "model.output=score", f"{train}={pair}", "parallel.context=2"),
            (kind, "parallel.context"),
            world_size=2,
        ),
        Case(
            (f"{kind}=reward", "model.output=score", f"{train}={pair}", "data.packing=best_fit"), ("data.packing", kind)
        ),
        Case(("model.lora={rank: 2}", "zero.stage=3"), ("model.lora.rank", "zero.stage")),
        Case(
            ("model.lora={rank: 2}", "parallel.pipeline=2", "model.tie_embeddings=true"),
            ("model.lora.rank", "parallel.pipeline", "model.tie_embeddings"),
            world_size=2,
        ),
        Case(
            ("data.fim.rate=0.5", "data.fim.middle_token=x", "data.fim.suffix_token=x"),
            ("data.fim.suffix_token", "data.fim.middle_token"),
        ),
        Case(
            ("data.fim.rate=0.5", "data.fim.suffix_token=x", "data.fim.prefix_token=x"),
            ("data.fim.prefix_token", "data.fim.suffix_token"),
        ),
        Case(('data.train=["a\\0b"]',), ("data.train",)),
        Case(("data.validation=[' ']",), ("data.validation",)),
        Case(('run.dir="a\\0b"',), ("run.dir",)),
        Case(('checkpoint.resume="a\\0b"',), ("checkpoint.resume",)),
    ]
    return cases


def axis_cases() -> list[Case]:
    """Axes of the layout that divide the same dimension, and values one above a limit."""
    sequence, heads = ("data.seq_length", "parallel.tensor"), ("model.num_kv_heads", "parallel.context")
    cases = [
        Case(
            ("parallel.sequence=true", "parallel.tensor=2", "parallel.context=2", f"data.seq_length={length}"),
            sequence,
            world_size=4,
        )
        for length in (2, 30, 62)
    ]
    cases += [
        Case(("parallel.tensor=2", "parallel.context=2", f"model.num_kv_heads={kv}"), heads, world_size=4)
        for kv in (2, 6)
    ]
    cases += [Case(("parallel.context=3", "data.seq_length=64"), ("data.seq_length", "parallel.context"), world_size=3)]
    cases += [
        Case(("optimizer.type=muon", f"parallel.{axis}=2"), ("optimizer.type", f"parallel.{axis}"), world_size=2)
        for axis in ("pipeline", "context")
    ]
    cases += [
        Case((f"parallel.{axis}=2", "parallel.context=2"), (f"parallel.{axis}", "parallel.context"), world_size=6)
        for axis in ("tensor", "pipeline")
    ]
    cases += [
        Case(
            ("parallel.pipeline=2", "model.num_layers=3", "parallel.partition=[1, 1, 1]"),
            ("parallel.partition", "parallel.pipeline"),
            world_size=2,
        ),
        Case(("model.head_dim=257", "model.attention_backend=native"), ("model.head_dim", "model.attention_backend")),
        Case(
            ("schedule.type=wsd", "schedule.warmup_iters=41", "schedule.cooldown_iters=60"),
            ("schedule.warmup_iters", "schedule.cooldown_iters", "train.train_iters"),
        ),
        Case(
            ("schedule.type=wsd", "schedule.warmup_iters=100", "schedule.cooldown_iters=1"),
            ("schedule.warmup_iters", "schedule.cooldown_iters", "train.train_iters"),
        ),
        Case(("schedule.warmup_iters=101",), ("schedule.warmup_iters", "train.train_iters")),
        Case(
            (
                "model.rope_scaling={type: llama3, factor: 4, original_max_position_embeddings: 64, low_freq_factor: "
                "5, high_freq_factor: 4}",
            ),
            ("model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor"),
        ),
    ]
    return cases


CASES = tuple(
    objective_cases()
    + axis_cases()
    + guard_cases()
    + model_cases()
    + data_cases()
    + schedule_cases()
    + batch_cases()
    + parallel_cases()
    + deepspeed_cases()
)


def report(case: Case) -> str:
    """The error lines of a case; empty if it is valid."""
    config = load_config(overrides=[*BASE, *case.overrides])
    try:
        validate(config, case.world_size, case.device)
    except ConfigError as error:
        return error.line()
    return ""


if __name__ == "__main__":
    for each in CASES:
        print(each.overrides, report(each), sep="\n")
