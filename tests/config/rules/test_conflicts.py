"""Every conflict of a config: on both sides of each condition, exactly the broken rules are reported."""

from __future__ import annotations

import json
import re

import pytest

from neox.config.load import load, load_config
from neox.config.rules import LAYOUT_RULES, RULES, Conflict, Environment, batch
from neox.config.rules.data import sources
from neox.config.validate import validate
from neox.errors import ConfigError
from tests.config.rules.contradictions import BASE

NO_NORM = "optimizer.gradient_clipping=0 deepspeed.zero_optimization.compute_grad_norm=false"
PAIR = "data.train=[{path: a, rejected: b}]"
DPO = f"train.objective=dpo {PAIR}"
REWARD = f"train.objective=reward model.output=score {PAIR}"
YARN, LLAMA3 = (
    f"model.rope_scaling={{type: {kind}, factor: 2, original_max_position_embeddings: 8" for kind in ("yarn", "llama3")
)
HOPPER = "model.attention_backend=hopper model.head_dim=64 precision.dtype=bf16"
SHARED = "shared norm without parallel residual"
LONG = "data.seq_length exceeds model.max_position_embeddings"
ODD, NONE = "odd number of rotated channels", "no channel is rotated"
ROTARY = "rotary option without rotary positions"
GIVEN_TWICE, NO_DATA = "data is given twice", "no training data"
UNMATCHED = "data does not match the objective"
ONE_ANSWER = "labels of one answer of the pairs only"
OVERLAP = "warmup and cooldown overlap"
NO_VALIDATION = "evaluation without validation data"


def config_of(overrides: str):
    return load_config(overrides=[*BASE, *re.split(r" (?=[a-z0-9_.]+=)", overrides)] if overrides else BASE)


def conflicts(overrides: str, world_size: int = 1, device: str = "cpu") -> list[Conflict]:
    """All broken rules."""
    config, environment = config_of(overrides), Environment(world_size, device)
    return [conflict for rule in RULES for conflict in rule(config, environment)]


def hopper_without(option: str) -> str:
    return f"attention backend hopper does not support {option}"


@pytest.mark.parametrize(
    ("overrides", "where", "wanted"),
    [
        # heads: hidden_size is 96
        ("model.num_attention_heads=11", "1 cpu", ["heads do not divide the hidden size"]),
        ("model.num_attention_heads=7 model.head_dim=13", "1 cpu", ["heads do not divide the hidden size", ODD]),
        ("model.num_attention_heads=7 model.head_dim=14", "1 cpu", []),
        ("model.num_kv_heads=12", "1 cpu", []),
        ("model.num_kv_heads=24", "1 cpu", ["key/value heads do not divide the query heads"]),
        ("model.head_dim=258", "1 cpu", ["head_dim is too large"]),
        ("model.attention_softcap=1 model.attention_backend=native", "1 cpu", []),
        # kernels
        ("model.attention_backend=native precision.dtype=fp32", "1 cpu", []),
        ("model.attention_softcap=1 precision.dtype=fp32", "1 cpu", []),
        ("model.attention_backend=auto precision.dtype=fp32", "1 cuda", []),
        ("model.attention_backend=sdpa precision.dtype=fp32", "1 cuda", []),
        (
            "model.attention_softcap=1 model.attention_backend=sdpa precision.dtype=fp32",
            "1 cuda",
            ["attention backend does not support softcap"],
        ),
        (
            "model.attention_softcap=1 model.attention_backend=native precision.dtype=fp32",
            "1 cuda",
            ["softcap in fp32 is not supported on a GPU"],
        ),
        (
            "model.attention_backend=native precision.dtype=fp32",
            "1 cuda",
            ["the native attention kernels do not support fp32 on a GPU"],
        ),
        (HOPPER, "1 cpu", ["attention backend hopper needs a GPU"]),
        (HOPPER, "1 cuda", []),
        (f"{HOPPER} model.head_dim=128", "1 cuda", []),
        (f"{HOPPER} model.head_dim=66", "1 cuda", [hopper_without("this head_dim")]),
        (f"{HOPPER} model.position_embedding=learned model.sliding_window=5", "1 cuda", []),
        (f"{HOPPER} precision.dtype=fp32", "1 cuda", [hopper_without("fp32")]),
        (
            f"{HOPPER} model.attention_softcap=2 model.attention_dropout=0.1 model.position_embedding=alibi",
            "1 cuda",
            [hopper_without(option) for option in ("softcap", "dropout", "ALiBi")],
        ),
        # positions: head_dim is 8 and there are 64 positions
        ("model.rotary_pct=0.2", "1 cpu", [ODD, NONE]),
        ("model.rotary_pct=0.1", "1 cpu", [NONE]),
        ("model.rotary_pct=0.25", "1 cpu", []),
        ("model.rotary_pct=0.4", "1 cpu", [ODD]),
        ("model.rotary_pct=0.4 model.position_embedding=none", "1 cpu", [ROTARY]),
        (
            "model.rotary_pct=0.5 model.rope_theta=5 model.rope_scaling={type: linear, factor: 2} "
            "model.position_embedding=learned",
            "1 cpu",
            [ROTARY] * 3,
        ),
        ("model.position_embedding=alibi data.seq_length=65", "1 cpu", []),
        ("model.position_embedding=none data.seq_length=65", "1 cpu", []),
        ("data.seq_length=65", "1 cpu", [LONG]),
        ("data.seq_length=63", "1 cpu", []),
        # rotary scaling
        ("model.rope_scaling={type: ntk, factor: 1}", "1 cpu", []),
        ("model.rope_scaling={type: linear, factor: 0.99}", "1 cpu", ["rotary scaling shortens the context"]),
        (f"{LLAMA3}, beta_slow: 32}}", "1 cpu", []),
        (f"{YARN}, low_freq_factor: 4}}", "1 cpu",
         []),
        (f"{YARN}, beta_slow: 31.9}}", "1 cpu", []),
        (f"{YARN}, beta_slow: 33}}", "1 cpu",
         ["frequency bands out of order"]),
        (f"{LLAMA3}, low_freq_factor: 3.9}}",
         "1 cpu", []),
        # residual and its biases
        ("model.shared_residual_norm=true", "1 cpu", [SHARED]),
        *(
            (f"optimizer.row_bias_lr_multiplier=2 model.parallel_residual=true model.{name}=false", "1 cpu", [])
            for name in ("attention_out_bias", "mlp_bias", "qkv_bias")
        ),
        ("model.attention_out_bias=false model.mlp_bias=false", "1 cpu", []),
        # adapters
        ("model.lora={rank: 96}", "1 cpu", []),
        ("model.lora={rank: 97}", "1 cpu", ["adapters are larger than the matrices they adapt"]),
        ("model.lora={rank: 2, targets: [mlp.gate]} model.activation=silu", "1 cpu",
         ["no LoRA target exists in the model"]),
        ("model.lora={rank: 2, targets: [mlp.up]}", "1 cpu", []),
        ("model.lora={rank: 2} zero.stage=3", "1 cpu", ["ZeRO stage 3 shards frozen weights"]),
        ("parallel.pipeline=2 model.tie_embeddings=true", "2 cpu", []),
        # layout
        ("parallel.tensor=2", "2 cpu", []),
        ("parallel.tensor=2", "1 cpu", ["world size does not match the parallel layout"]),
        ("parallel.tensor=2 parallel.pipeline=2", "6 cpu", ["world size does not match the parallel layout"]),
        ("parallel.tensor=4 model.num_kv_heads=2", "4 cpu", ["tensor parallelism does not divide the model"]),
        ("parallel.tensor=2 parallel.sequence=true data.seq_length=62", "2 cpu", []),
        ("parallel.tensor=2 parallel.sequence=true data.seq_length=61", "2 cpu",
         ["sequence parallelism does not divide the sequence"]),
        ("parallel.sequence=true", "1 cpu", ["sequence parallelism without tensor parallelism"]),
        ("parallel.pipeline=3", "3 cpu", ["more pipeline stages than layers"]),
        ("parallel.pipeline=2 zero.stage=2", "2 cpu", ["ZeRO stage is incompatible with pipeline parallelism"]),
        ("zero.stage=3", "2 cpu", []),
        ("parallel.partition=[2]", "1 cpu", []),
        ("parallel.partition=[3]", "1 cpu", ["parallel.partition does not sum to num_layers"]),
        ("parallel.partition=[1, 1]", "1 cpu", ["parallel.partition does not match the number of stages"]),
        ("model.num_kv_heads=4 parallel.context=4", "4 cpu", []),
        ("model.num_kv_heads=2 parallel.context=4", "4 cpu", ["too few key/value heads for context parallelism"]),
        ("parallel.context=3 data.seq_length=62", "3 cpu", ["context parallelism does not divide the sequence"]),
        ("optimizer.type=muon", "8 cpu", []),
        # data
        ("data.train=[] data.path=x", "1 cpu", []),
        ("data.path=x", "1 cpu", [GIVEN_TWICE]),
        ("data.train=[] data.path=x data.test=[t]", "1 cpu", [GIVEN_TWICE]),
        ("data.train=[] data.validation=[v]", "1 cpu", [NO_DATA]),
        ("data.train=[] data.text=[a] data.path=x", "1 cpu", [GIVEN_TWICE, "text without a tokenizer"]),
        ("data.test=[{path: a, weight: 0}]", "1 cpu", ["all weights are 0"]),
        ("data.train=[{path: a, weight: 0}, {path: b, weight: 0}, {path: c, weight: 1e-9}]", "1 cpu", []),
        ("data.test=[' ', b]", "1 cpu", ["source path is empty or invalid"]),
        ("data.train=[a, '', ' ']", "1 cpu", ["source path is empty or invalid"] * 2),
        ("evaluate.interval=1", "1 cpu", [NO_VALIDATION]),
        ("evaluate.interval=1 data.validation=[v]", "1 cpu", []),
        ("evaluate.interval=1 data.validation=[v] data.split='1'", "1 cpu", []),
        ("evaluate.interval=1 data.train=[] data.path=x", "1 cpu", []),
        ("evaluate.interval=1 data.train=[] data.path=x data.split='9,0,1'", "1 cpu", [NO_VALIDATION]),
        ("data.train=[] data.path=x data.split='9,0,1'", "1 cpu", []),
        ("data.split='0,1,1'", "1 cpu", ["split leaves no training data"]),
        ("data.packing=best_fit data.order=neox", "1 cpu", ["the order of GPT-NeoX needs concatenated documents"]),
        ("data.packing=document data.order=neox", "1 cpu", []),
        (f"{DPO} data.packing=best_fit", "1 cpu", ["preference pairs cannot be packed"]),
        (f"{DPO} data.packing=document", "1 cpu", []),
        ("data.fim.middle_token=x data.fim.prefix_token=x", "1 cpu", []),
        ("data.fim.rate=0.1", "1 cpu", ["fill in the middle without a tokenizer"]),
        # objective
        ("data.train=[a, {path: b, labels: c}]", "1 cpu", [UNMATCHED]),
        ("data.test=[{path: b, labels: c}]", "1 cpu", []),
        ("train.objective=sft data.train=[{path: b, labels: c}, d]", "1 cpu", [UNMATCHED]),
        ("train.objective=sft data.train=[{path: b, labels: c, rejected: d}]", "1 cpu", [UNMATCHED]),
        (f"{DPO} data.validation=[v]", "1 cpu", [UNMATCHED]),
        ("train.objective=dpo data.train=[{path: a, rejected: b, labels: l}]", "1 cpu", [ONE_ANSWER]),
        ("train.objective=dpo data.train=[{path: a, rejected: b, rejected_labels: l}]", "1 cpu", [ONE_ANSWER]),
        ("train.objective=reward model.output=score data.train=[{path: a, rejected: b, rejected_labels: l}]", "1 cpu",
         []),
        ("train.objective=sft data.train=[] data.path=x", "1 cpu", ["data.path has no labels or pairs"]),
        (f"{DPO} model.output=score", "1 cpu", ["output head does not match the objective"]),
        (f"{REWARD} model.output=tokens", "1 cpu", ["output head does not match the objective"]),
        (f"{REWARD} parallel.context=2", "2 cpu", ["context parallelism would split answers"]),
        # schedule: 100 steps
        ("schedule.warmup_iters=101", "1 cpu", ["warmup is longer than the schedule"]),
        ("schedule.warmup_iters=101 schedule.decay_iters=101", "1 cpu", []),
        ("schedule.warmup_iters=51 schedule.decay_iters=50", "1 cpu", ["warmup is longer than the schedule"]),
        ("schedule.type=wsd schedule.cooldown_iters=100", "1 cpu", []),
        ("schedule.type=wsd schedule.cooldown_iters=101", "1 cpu", [OVERLAP]),
        ("schedule.type=wsd schedule.cooldown_iters=9 schedule.decay_iters=8", "1 cpu", [OVERLAP]),
        ("schedule.type=wsd schedule.cooldown_iters=5 schedule.warmup_iters=101", "1 cpu",
         ["warmup is longer than the schedule"]),
        ("schedule.type=inverse_sqrt", "1 cpu", []),
        ("schedule.type=inverse_sqrt schedule.rule=gpt_neox", "1 cpu", ["GPT-NeoX has no such schedule"]),
        ("schedule.warmup_iters=1.5", "1 cpu", ["fractional warmup_iters"]),
        ("schedule.min_lr=6.01e-4", "1 cpu", ["min_lr exceeds the peak learning rate"]),
        ("schedule.type=constant schedule.min_lr=6e-4", "1 cpu", ["constant schedule with min_lr"]),
        # precision and paths
        ("precision.dtype=fp16", "1 cpu", ["fp16 needs a GPU"]),
        ("precision.dtype=fp16", "1 cuda", []),
        ("precision.min_loss_scale=65536", "1 cpu", []),
        ("precision.min_loss_scale=65537", "1 cpu", ["initial loss scale is below the minimum"]),
        ("run.dir=''", "1 cpu", ["path is empty or invalid"]),
        ("checkpoint.resume=' '", "1 cpu", ["path is empty or invalid"]),
        ("run.dir=.", "1 cpu", []),
        # rollback
        ("guard.loss_spike=rollback checkpoint.save_interval=0", "1 cpu", ["no checkpoint to roll back to"]),
        ("guard.loss_spike=rollback data.order=neox", "1 cpu", ["sample order ends with train_iters"]),
        *((f"guard.loss_spike={kind} data.order=neox checkpoint.save_interval=0", "1 cpu", [])
          for kind in ("off", "warn")),
        # DeepSpeed
        ("deepspeed.zero_optimization={offload_optimizer: null, offload_param: null} zero.stage=0", "1 cpu", []),
        ("deepspeed.zero_optimization.offload_param.device=cpu zero.stage=2", "1 cpu",
         ["cannot offload state that ZeRO does not shard"]),
        ("deepspeed.zero_optimization.offload_optimizer.device=cpu zero.stage=2", "1 cpu", []),
        ("deepspeed.aio=3", "1 cpu", ["not a section"]),
        ("deepspeed.data_efficiency=3", "1 cpu", []),
        ("deepspeed.comet={api_key: x, project: y}", "1 cpu", ["secret in a config"]),
        ("deepspeed.comet={project: y}", "1 cpu", []),
        # bf16 without the norm runs at ZeRO 2, fp16 at 0 to 2, fp32 never
        *(
            (f"{NO_NORM} precision.dtype={dtype} zero.stage={stage}", "1 cuda",
             (["gradients in fp32 are checked by their norm"] if dtype == "fp32" else [])
             + ([] if stage == 2 or (dtype != "bf16" and stage < 2) else ["ZeRO stage needs the gradient norm"]))
            for dtype in ("bf16", "fp16", "fp32") for stage in range(4)
        ),
        (f"{NO_NORM} precision.dtype=bf16 zero.stage=2 optimizer.gradient_clipping=0.1", "1 cpu",
         ["gradients are clipped by their norm"]),
        ("deepspeed.zero_optimization.compute_grad_norm=true precision.dtype=fp32 zero.stage=3", "1 cpu", []),
    ],
    ids=lambda value: value[-90:] if isinstance(value, str) else "",
)  # fmt: skip
def test_exactly_the_broken_rules_are_reported(overrides, where, wanted):
    world_size, device = where.split()
    assert [conflict.what for conflict in conflicts(overrides, int(world_size), device)] == wanted


@pytest.mark.parametrize(
    ("overrides", "world_size", "report"),
    [
        ("model.head_dim=258", 1,
         "where=--set model.head_dim, model.attention_backend; got=model.head_dim = 258, model.attention_backend = "
         "'auto'; want=head_dim at most 256 for the native kernels; do=use more heads, or model.attention_backend: "
         "sdpa"),
        ("data.seq_length=65", 1,
         "where=--set data.seq_length, --set model.max_position_embeddings; got=data.seq_length = 65, "
         "model.max_position_embeddings = 64; want=seq_length at most max_position_embeddings; "
         "do=set model.max_position_embeddings to 65 for a new model, or data.seq_length to 64"),
        ("parallel.tensor=2", 3,
         "where=--set parallel.tensor, parallel.pipeline; got=parallel.tensor = 2, parallel.pipeline = 1, world size = "
         "3; want=world size a multiple of tensor x pipeline; do=start that many processes: torchrun --nproc-per-node "
         "N, or deepspeed --num_gpus N"),
        ("parallel.context=2", 3,
         "where=parallel.tensor, parallel.pipeline, --set parallel.context; got=parallel.tensor = 1, parallel.pipeline "
         "= 1, parallel.context = 2, world size = 3; want=world size a multiple of tensor x pipeline x context; "
         "do=start that many processes: torchrun --nproc-per-node N, or deepspeed --num_gpus N"),
        ("parallel.tensor=5 model.num_kv_heads=12 model.intermediate_size=400", 5, None),
        ("train.micro_batch_size=3 train.gradient_accumulation=2 train.global_batch_size=11", 2,
         "where=--set train.micro_batch_size, --set train.gradient_accumulation, --set train.global_batch_size; "
         "got=train.micro_batch_size = 3, train.gradient_accumulation = 2, train.global_batch_size = 11, data-parallel "
         "size = 2; want=global_batch_size = micro_batch_size x gradient_accumulation x data-parallel size; "
         "do=set global_batch_size: 12, or omit one of them"),
        ("train.micro_batch_size=null train.gradient_accumulation=3 train.global_batch_size=11", 2,
         "where=--set train.gradient_accumulation, --set train.global_batch_size; got=train.gradient_accumulation = 3, "
         "train.global_batch_size = 11, data-parallel size = 2; want=global_batch_size = micro_batch_size x "
         "gradient_accumulation x data-parallel size: a multiple of 6"),
        ("train.micro_batch_size=null", 4,
         "where=--set train.micro_batch_size, train.global_batch_size; got=train.micro_batch_size = null, "
         "train.global_batch_size = null; want=at least one of them; do=set train.micro_batch_size"),
        ("model.rope_scaling={type: yarn, factor: 4}", 1,
         "where=--set model.rope_scaling.type, model.rope_scaling.original_max_position_embeddings; "
         "got=model.rope_scaling.type = 'yarn', model.rope_scaling.original_max_position_embeddings = null; "
         "want=original_max_position_embeddings set for yarn"),
        ("deepspeed.zero_optimization.overlap_com=true", 1,
         "where=--set deepspeed.zero_optimization.overlap_com; got=deepspeed.zero_optimization.overlap_com = true; "
         "want=a key of DeepSpeed's config; do=did you mean deepspeed.zero_optimization.overlap_comm?"),
        ("deepspeed.qqqq=1", 1,
         "where=--set deepspeed.qqqq; got=deepspeed.qqqq = 1; want=a key of DeepSpeed's config"),
        ("deepspeed.zero_optimization.stage=1", 1,
         "where=--set deepspeed.zero_optimization.stage, zero.stage; got=deepspeed.zero_optimization.stage = 1, "
         "zero.stage = 1; want=set by zero.stage; do=set zero.stage"),
        ("deepspeed.aio=true", 1,
         "where=--set deepspeed.aio; got=deepspeed.aio = true; want=keys below it, such as block_size"),
        ("deepspeed.amp={enabled: true}", 1,
         "where=--set deepspeed.amp; got=deepspeed.amp = {'enabled': True}; want=no such key; do=remove the key"),
        ("deepspeed.zero_optimization.offload_param={device: cpu}", 1,
         "where=--set deepspeed.zero_optimization.offload_param, zero.stage; "
         "got=deepspeed.zero_optimization.offload_param = {'device': 'cpu'}, zero.stage = 1; "
         "want=zero.stage at least 3"),
        (f"{NO_NORM} zero.stage=3", 1,
         "where=--set deepspeed.zero_optimization.compute_grad_norm, --set zero.stage; "
         "got=deepspeed.zero_optimization.compute_grad_norm = false, zero.stage = 3; "
         "want=zero.stage: 2 without the norm in bf16"),
        ("evaluate.interval=1", 1,
         "where=--set evaluate.interval, data.validation; got=evaluate.interval = 1, data.validation = []; "
         "want=validation data, or evaluate.interval: 0"),
        ("optimizer.type=muon parallel.pipeline=2", 2,
         "where=--set optimizer.type, --set parallel.pipeline; got=optimizer.type = 'muon', parallel.pipeline = 2; "
         "want=pipeline: 1 with muon; do=use another optimizer"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)  # fmt: skip
def test_the_complete_report_of_a_conflict(overrides, world_size, report):
    loaded_with = re.split(r" (?=[a-z0-9_.]+=)", overrides)
    lines = reported(loaded_with, world_size)
    if report is None:
        assert [line.partition("got=")[2] for line in lines] == [
            f"model.{name} = 12, parallel.tensor = 5; want={name} a multiple of parallel.tensor"
            for name in ("num_attention_heads", "num_kv_heads")
        ]
    else:
        assert [line.partition("; ")[2] for line in lines] == [report]


def reported(overrides: list[str], world_size: int) -> list[str]:
    """The lines of the error of overrides, with origins."""
    loaded = load([], [*BASE, *overrides])
    with pytest.raises(ConfigError) as caught:
        validate(loaded.config, world_size, "cpu", loaded.origins)
    return caught.value.line().splitlines()


def test_the_vocabulary_and_the_tokens_of_a_tokenizer(tmp_path):
    file = tmp_path / "t.json"
    added = [{"content": f"<|fim_{name}|>", "id": 97 + i} for i, name in enumerate(("prefix", "middle", "suffix"))]
    file.write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added}))
    with_file = f"tokenizer.file={file}"
    assert conflicts(with_file) == conflicts(f"{with_file} data.fim.rate=1 data.fim.split_sample=a") == []
    assert conflicts(f"{with_file} data.train=[] data.text=[x.txt]") == []
    (found,) = conflicts(f"{with_file} model.vocab_size=99")
    assert (found.what, found.facts, found.rule) == (
        "tokenizer ids exceed the vocabulary",
        (("ids", 100),),
        "vocab_size at least 100",
    )
    missing = conflicts(f"{with_file} data.fim.rate=1 data.fim.split_sample=b data.fim.suffix_token=c")
    assert [conflict.keys[0] for conflict in missing] == ["data.fim.suffix_token", "data.fim.split_sample"]
    assert conflicts(f"{with_file} data.fim.suffix_token=c") == []
    same = conflicts(f"{with_file} data.fim.rate=1 data.fim.suffix_token=a data.fim.middle_token=a")
    assert [conflict.what for conflict in same] == ["tokens of fill in the middle are not distinct"]
    (found,) = conflicts(f"{with_file} tokenizer.eod_token=zz")
    assert found.keys == ("tokenizer.eod_token", "tokenizer.file")


@pytest.mark.parametrize("content", [None, "{"])
def test_a_tokenizer_that_cannot_be_read_is_reported_once(tmp_path, content):
    file = tmp_path / "t.json"
    if content is not None:
        file.write_text(content)
    (found,) = conflicts(f"tokenizer.file={file} data.fim.rate=1 tokenizer.eod_token=x")
    assert (found.what, found.keys) == ("cannot read the tokenizer", ("tokenizer.file",))
    assert content is not None or found.facts == (("reason", "No such file or directory"),)


def test_a_plan_checks_neither_data_nor_folders():
    config = config_of("data.train=[] run.dir='' data.fim.rate=1 schedule.warmup_iters=999")
    environment = Environment(1, "cpu")
    assert [conflict for rule in LAYOUT_RULES for conflict in rule(config, environment)] == []
    assert len([conflict for rule in RULES for conflict in rule(config, environment)]) == 4
    assert set(LAYOUT_RULES) < set(RULES) and batch in LAYOUT_RULES and sources not in LAYOUT_RULES


def test_the_folder_of_a_run_may_exist_and_may_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert conflicts(f"run.dir={tmp_path}") == conflicts(f"run.dir={tmp_path}/new/run") == []
    for name in ("file", "link"):
        (found,) = conflicts(f"run.dir={tmp_path}/{name}")
        assert (found.what, found.keys) == ("run.dir is a file", ("run.dir",))
    assert conflicts(f"run.dir={tmp_path}/file/below") == []  # its creation reports why


def test_every_key_of_deepspeed_is_checked():
    found = conflicts(
        "deepspeed={bf16: {enabled: true}, aio: 3, dump_state: true, wandb: {bogus: 1, other: 2}, amp: {}}"
    )
    assert [(conflict.what, conflict.keys[0]) for conflict in found] == [
        ("DeepSpeed key that neox sets", "deepspeed.bf16"),
        ("not a section", "deepspeed.aio"),
        ("unknown DeepSpeed key", "deepspeed.wandb.bogus"),
        ("unknown DeepSpeed key", "deepspeed.wandb.other"),
        ("DeepSpeed removed this feature", "deepspeed.amp"),
    ]
