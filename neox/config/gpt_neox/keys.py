"""Every key of GPT-NeoX's YAML files, and how it is translated.

There are four kinds of keys:

- renamed: the value is copied to another key.
- translated: the modules of this package compute native values from it, together with other keys.
- ignored: it has no effect in neox; the text gives the reason.
- unsupported: an error with the next action, unless the value has no effect in GPT-NeoX either.

Names and defaults are those of `neox_arguments` in GPT-NeoX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class KeyRule:
    """How one key of GPT-NeoX is translated.

    Attributes:
        kind: see the module.
        to: native keys that it sets.
        default: GPT-NeoX's default; None if it has none.
        text: ignored: the reason; unsupported: what to do; translated: how.
        harmless: unsupported: values that are accepted because they enable nothing.
    """

    kind: Literal["renamed", "translated", "ignored", "unsupported"]
    to: tuple[str, ...] = ()
    default: object = None
    text: str = ""
    harmless: tuple[object, ...] = ()


def _renamed(to: str, default: object = None) -> KeyRule:
    return KeyRule("renamed", (to,), default)


def _translated(to: str, how: str, default: object = None) -> KeyRule:
    return KeyRule("translated", tuple(to.split()), default, how)


def _unsupported(do: str, *names: str, harmless: tuple[object, ...] = (None, False)) -> dict[str, KeyRule]:
    rule = KeyRule("unsupported", text=do, harmless=harmless)
    return dict.fromkeys(names, rule)


ARCHITECTURE = {
    "num_layers": _renamed("model.num_layers"),
    "hidden_size": _renamed("model.hidden_size"),
    "num_attention_heads": _renamed("model.num_attention_heads"),
    "num_kv_heads": _renamed("model.num_kv_heads"),
    "max_position_embeddings": _renamed("model.max_position_embeddings"),
    "gpt_j_residual": _renamed("model.parallel_residual", False),
    "gpt_j_tied": _translated("model.shared_residual_norm", "true if gpt_j_residual is true too", False),
    "hidden_dropout": _renamed("model.hidden_dropout", 0.0),
    "attention_dropout": _renamed("model.attention_dropout", 0.0),
    "init_method_std": _renamed("model.init_std", 0.02),
    "init_method": _translated("model.init", "same name", "normal"),
    "output_layer_init_method": _translated("model.output_init", "same name", "scaled_normal"),
    "use_bias_in_attn_linear": _translated("model.qkv_bias model.attention_out_bias", "same value for both", True),
    "use_bias_in_mlp": _renamed("model.mlp_bias", True),
    "use_bias_in_norms": _translated("model.norm", "false requires a norm without bias: rmsnorm", True),
    "norm": _translated("model.norm", "layernorm, rmsnorm, and their te_ forms", "layernorm"),
    "layernorm_epsilon": _translated("model.norm_eps", "with layernorm", 1e-5),
    "rms_norm_epsilon": _translated("model.norm_eps", "with rmsnorm", 1e-8),
    "activation": _translated("model.activation", "gelu is gelu_tanh with bias_gelu_fusion; swish is silu", "gelu"),
    "bias_gelu_fusion": _translated("model.activation", "the fused kernel of GPT-NeoX computes the tanh form", False),
    "onnx_safe": _translated("model.activation", "gelu in the erf form", False),
    "intermediate_size": _translated(
        "model.intermediate_size", "gated: a third of it, rounded up to mlp_multiple_of", None
    ),
    "expansion_factor": _translated("model.intermediate_size", "x hidden_size"),
    "mlp_multiple_of": _translated("model.intermediate_size", "the width is rounded up to a multiple of it", 1),
    "pos_emb": _translated("model.position_embedding", "rotary, learned, alibi, none", "learned"),
    "rotary_pct": _translated("model.rotary_pct", "with pos_emb: rotary", 1.0),
    "rotary_emb_base": _translated("model.rope_theta", "with pos_emb: rotary", 10000),
    "no_weight_tying": _translated("model.tie_embeddings", "the opposite", False),
    "sliding_window_width": _translated(
        "model.sliding_window", "+ 1: the window of GPT-NeoX does not count the query itself"
    ),
    "attention_config": _translated("model.sliding_window", "global or flash in every layer"),
    "use_qk_layernorm": KeyRule(
        "unsupported",
        text="the query/key norm of neox is an RMSNorm per head (model.qk_norm), which is another model",
        harmless=(None, False),
    ),
    "precision": _translated("precision.dtype", "fp32, bfloat16, fp16"),
}
VOCABULARY = {
    "tokenizer_type": _translated(
        "model.vocab_size tokenizer.file",
        "HFTokenizer reads vocab_file; GPT2BPETokenizer has 50,257 ids",
        "GPT2BPETokenizer",
    ),
    "vocab_file": _translated("tokenizer.file model.vocab_size", "with HFTokenizer"),
    "make_vocab_size_divisible_by": _translated(
        "model.vocab_size", "ids are padded to a multiple of this x model_parallel_size", 128
    ),
}
OPTIMIZER = {
    "optimizer": _translated(
        "optimizer.type optimizer.lr optimizer.betas optimizer.eps optimizer.weight_decay",
        "type and params; Adam of GPT-NeoX decouples the weight decay too",
        {"type": "Adam", "params": {"lr": 0.001}},
    ),
    "weight_decay": _translated("optimizer.weight_decay", "same", 0.1),
    "gradient_clipping": _translated("optimizer.gradient_clipping", "same", 1.0),
    "clip_grad": _translated("optimizer.gradient_clipping", "same as gradient_clipping"),
    "lr_decay_style": _translated(
        "schedule.type schedule.rule", "constant, linear, cosine, by rule: gpt_neox", "linear"
    ),
    "lr_decay_iters": _translated("schedule.decay_iters", "same; takes precedence over lr_decay_fraction"),
    "lr_decay_fraction": _translated("schedule.decay_iters", "x train_iters, rounded down"),
    "min_lr": _translated("schedule.min_lr", "same; 0 with a constant rate", 0.0),
    "warmup": _translated(
        "schedule.warmup_iters", "x lr_decay_iters, or train_iters if that is not set; not rounded", 0.01
    ),
    "fp16": _translated(
        "precision.dtype precision.initial_scale_power precision.loss_scale_window precision.min_loss_scale",
        "enabled, initial_scale_power, loss_scale_window, min_loss_scale",
    ),
    "bf16": _translated("precision.dtype", "enabled"),
    "zero_optimization": _translated(
        "zero.stage deepspeed.zero_optimization", "stage; other keys are passed to DeepSpeed", {"stage": 0}
    ),
}
TRAINING = {
    "train_iters": _renamed("train.train_iters"),
    "seed": _renamed("train.seed", 1234),
    "train_batch_size": _renamed("train.global_batch_size"),
    "train_micro_batch_size_per_gpu": _translated("train.micro_batch_size", "same"),
    "batch_size": _translated("train.micro_batch_size", "old name of train_micro_batch_size_per_gpu"),
    "gradient_accumulation_steps": _translated("train.gradient_accumulation", "same"),
    "gas": _translated("train.gradient_accumulation", "old name of gradient_accumulation_steps"),
    "checkpoint_activations": _translated("train.activation_checkpointing", "true: full, false: none", False),
    "model_parallel_size": _translated(
        "parallel.tensor optimizer.row_bias_lr_multiplier",
        "0 means 1; with gpt_j_residual also the learning rate of row-parallel biases",
        1,
    ),
    "pipe_parallel_size": _translated("parallel.pipeline", "0 means 1", 0),
    "sequence_parallel": _translated("parallel.sequence", "no effect with model_parallel_size 1", False),
    "eval_interval": _translated("evaluate.interval", "same; eval_iters: 0 disables it", 1000),
    "eval_iters": _translated("evaluate.iters evaluate.interval", "same; 0: no evaluation", 100),
    "log_interval": _renamed("logging.interval", 100),
    "keep_last_n_checkpoints": _translated("checkpoint.keep", "none: 0"),
    "checkpoint_factor": _translated("checkpoint.save_interval", "with checkpoint_scale: linear"),
    "save_interval": _translated("checkpoint.save_interval", "old name of checkpoint_factor"),
    "checkpoint_scale": _translated("checkpoint.save_iters", "log: powers of checkpoint_factor", "linear"),
    "extra_save_iters": _translated("checkpoint.save_iters", "same"),
    "profile": _translated("profile.start", "true: at profile_step_start", False),
    "profile_step_start": _translated("profile.start", "with profile: true", 10),
    "profile_step_stop": _translated("profile.steps", "- profile_step_start", 12),
    "memory_profiling": _translated("profile.memory", "same", False),
    "use_wandb": _translated("logging.wandb", "true: log there", None),
    "wandb_project": _translated("logging.wandb.project", "with use_wandb", "neox"),
    "wandb_group": _translated("logging.wandb.group", "with use_wandb"),
    "wandb_run_name": _translated("logging.wandb.name", "with use_wandb"),
    "wandb_team": _translated("logging.wandb.entity", "with use_wandb"),
    "wandb_host": _translated("logging.wandb.host", "with use_wandb, unless it is the public server"),
    "use_comet": _translated("logging.comet", "true: log there", None),
    "comet_project": _translated("logging.comet.project", "with use_comet", "neox"),
    "comet_workspace": _translated("logging.comet.workspace", "with use_comet"),
    "comet_experiment_name": _translated("logging.comet.name", "with use_comet"),
    "comet_tags": _translated("logging.comet.tags", "with use_comet"),
    "save": _translated("run.dir", "folder of the run; checkpoints are in run.dir/checkpoints"),
    "load": _translated(
        "checkpoint.resume checkpoint.init_from",
        "equal to save: resume auto; with finetune: init_from; else resume PATH",
    ),
    "finetune": _translated("checkpoint.init_from", "starts at step 0 from the weights of load", False),
}
PARTS = {"train": "train", "valid": "validation", "test": "test"}
DATA = {
    "seq_length": _renamed("data.seq_length"),
    "data_path": _renamed("data.path"),
    "split": _translated("data.split", "same; with data_path", "969, 30, 1"),
    **{f"{part}_data_paths": _translated(f"data.{ours}", "same") for part, ours in PARTS.items()},
    **{f"{part}_data_weights": _translated(f"data.{ours}", "weights") for part, ours in PARTS.items()},
}
POST_TRAINING = {
    "train_impl": _translated("train.objective", "normal: pretrain, or sft with label data; dpo; rm: reward", "normal"),
    "dataset_impl": _translated("data.train", "gpt2, or pairwise with dpo and rm", "gpt2"),
    "pack_impl": _translated(
        "data.packing data.order", "packed: concatenate; pack_until_overflow: best_fit; unpacked: document", "packed"
    ),
    "dpo_beta": _translated("train.dpo_beta", "with train_impl: dpo", 0.1),
    **{f"{part}_label_data_paths": _translated(f"data.{ours}", "labels") for part, ours in PARTS.items()},
    **{f"pos_{part}_data_paths": _translated(f"data.{ours}", "path") for part, ours in PARTS.items()},
    **{f"pos_{part}_label_data_paths": _translated(f"data.{ours}", "labels") for part, ours in PARTS.items()},
    **{f"neg_{part}_data_paths": _translated(f"data.{ours}", "rejected") for part, ours in PARTS.items()},
    **{f"neg_{part}_label_data_paths": _translated(f"data.{ours}", "rejected_labels") for part, ours in PARTS.items()},
}

DEEPSPEED = {
    name: _translated(f"deepspeed.{name}", "passed through")
    for name in [
        "autotuning",
        "comet",
        "comms_logger",
        "communication_data_type",
        "csv_monitor",
        "data_efficiency",
        "dump_state",
        "flops_profiler",
        "gradient_predivide_factor",
        "prescale_gradients",
        "wandb",
    ]
} | {"deepspeed_extra_args": _translated("deepspeed", "passed through, key by key")}

# reason -> the keys that have no effect in neox
IGNORED_BECAUSE = {
    "the kernels of neox are always fused and compute the same": """
        scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion bias_dropout_fusion rope_fusion
        layernorm_fusion rmsnorm_fusion use_flashattn_swiglu
    """,
    "scores, softmax and loss are always fp32": "dpo_fp32 attention_softmax_in_fp32 apply_query_key_layer_scaling "
    "fp16_lm_cross_entropy",
    "gradients are always accumulated in fp32": "fp32_allreduce data_types",
    "the output projection is always vocabulary-parallel": "output_layer_parallelism",
    "initial weights do not depend on the device": "use_cpu_initialization",
    "rotary tables are computed, not stored": "rotary_save_freqs_buffer",
    "applies to attention types that attention_config rejects": """
        gmlp_attn_dim sparsity_config dim_att head_size ffn_dim mamba_selective_scan_fusion mamba_causal_conv_fusion
        mamba_inner_func_fusion mamba_selective_fp32_params mamba_use_bias_in_conv mamba_use_bias_in_linears
    """,
    "applies to other values of norm and pos_emb": "scalenorm_epsilon rpe_num_buckets rpe_max_distance",
    "applies with num_unique_layers, which is an error": "param_sharing_style",
    "computed from other keys": """
        padded_vocab_size optimizer_type lr zero_stage zero_reduce_scatter zero_contiguous_gradients
        zero_reduce_bucket_size zero_allgather_bucket_size is_pipe_parallel dynamic_loss_scale curriculum_seqlen
        config_files git_hash iteration do_train do_valid do_test save_iters tokenizer tensorboard_writer
        adlr_autoresume_object comet_experiment comet_experiment_key
    """,
    "stages are balanced by parameters; see parallel.partition": "pipe_partition_method",
    "moments are fp32: more memory, the same update": "use_bnb_optimizer",
    "an option of the launcher: pass it to `deepspeed`, torchrun or srun": """
        hostfile exclude num_nodes num_gpus master_port master_addr launcher force_multi detect_nvlink_pairs comment
        autotuning_run no_ssh_check user_script deepspeed_mpi deepspeed_slurm local_rank rank world_size global_num_gpus
        include account lazy_mpu_init
    """,
    "DeepSpeed is always used": "deepspeed deepscale deepscale_config",
    "NCCL on GPUs, gloo on CPUs": "distributed_backend",
    "complete blocks are recomputed, and their inputs stay in device memory": """
        checkpoint_num_layers partition_activations contiguous_checkpointing synchronize_each_layer
        deepspeed_activation_checkpointing checkpoint_in_cpu profile_backward activation_checkpointing
    """,
    "all datasets are memory-mapped": "data_impl mmap_warmup use_shared_fs num_workers",
    "long documents are cut; all samples have the same length": "allow_chopped short_seq_prob",
    "merges are in the JSON file of the tokenizer": "merge_file",
    "metrics.jsonl has the time of every step; logging.interval controls the terminal": "steps_per_print "
    "wall_clock_breakdown",
    "metrics.jsonl has the gradient norm of every step": "log_grad_norm",
    "not recorded": """
        log_grad_pct_zeros log_param_norm log_optimizer_states log_gradient_noise_scale gradient_noise_scale_n_batches
        gradient_noise_scale_cpu_offload char_level_ppl log_memory_stats
    """,
    "log.txt is in run.dir": "log_dir",
    "TensorBoard files are in run.dir/tensorboard": "tensorboard_dir tensorboard",
    "read from the fp16 section": "hysteresis loss_scale_window min_scale",
    "checkpoints are complete, have checksums, and have one format": """
        no_save_optim no_save_rng no_load_rng checkpoint checkpoint_validation_with_forward_pass load_universal
        s3_chunk_size
    """,
    "a resumed run uses the schedule of the config": "override_lr_scheduler use_checkpoint_lr_scheduler",
    "after a signal the run saves a checkpoint and stops": "adlr_autoresume adlr_autoresume_interval",
    "an option of neox generate": """
        text_gen_type temperature top_p top_k maximum_tokens prompt_end sample_input_file sample_output_file num_samples
        recompute return_logits precompute_model_name
    """,
    "an option of neox evaluate": "eval_results_prefix eval_tasks",
    "applies with moe_num_experts above 1, which is an error": """
        moe_top_k use_tutel moe_loss_coeff moe_train_capacity_factor moe_glu moe_eval_capacity_factor moe_min_capacity
        moe_token_dropping moe_type create_moe_param_group moe_use_residual moe_expert_parallel_size moe_lbl_in_fp32
        moe_jitter_eps enable_expert_tensor_parallelism expert_interval moe_expert_interval moe_router_type
    """,
    "applies with use_mup, which is an error": """
        coord_check save_base_shapes base_shapes_file mup_init_scale mup_attn_temp mup_output_temp mup_embedding_mult
        mup_rp_embedding_mult mup_width_scale mup_hp_search
    """,
    "applies with weight_by_num_documents, which is an error": "weighted_sampler_alpha weighted_document_limit",
    "log-probabilities of the reference are always computed before the first step": "precompute_logprobs",
    "applies to values of train_impl that are errors": """
        kto_fp32 kto_beta kl_impl kto_desirable_weight kto_undesirable_weight fp32_reinforce
        kl_div_beta reinforce_leave_one_out serve_model_weights online_dataserver_ips online_dataserver_ports
        weight_server_port
    """,
    "kernels are compiled when the package is installed": "fused_kernels_build_path",
    "MFU is relative to the peak of the device, from a table or measured": "peak_theoretical_tflops",
    "applies to layers of Transformer Engine in fp8, which is an error": """
        te_fp8_format te_fp8_wgrad te_fp8_margin te_fp8_amax_history_len te_fp8_amax_compute_algo
    """,
    "the kernels of neox replace those of Transformer Engine, without fp8": "te_columnparallel te_rowparallel "
    "te_layernorm_mlp te_mha",
    "only rank 0 logs to Weights & Biases": "wandb_init_all_ranks",
    "the complete config is logged with the experiment": "comet_others",
    "traces are in run.dir/profile": "memory_profiling_path",
}
IGNORED = {name: KeyRule("ignored", text=why) for why, names in IGNORED_BECAUSE.items() for name in names.split()}

UNSUPPORTED = {
    **_unsupported(
        "KTO and REINFORCE are not implemented; set train_impl: dpo",
        *(f"{part}_reward_data_paths" for part in PARTS),
        harmless=(None, []),
    ),
    **_unsupported("DPO always uses the initial weights as reference; remove the key", "dpo_reference_free"),
    **_unsupported(
        "mixtures of experts are not implemented; set moe_num_experts: 1", "moe_num_experts", harmless=(None, 1)
    ),
    **_unsupported("muP is not implemented; set use_mup: false", "use_mup"),
    **_unsupported("shared layers are not implemented; remove the key", "num_unique_layers", harmless=(None,)),
    **_unsupported("soft prompts are not implemented; remove the key", "soft_prompt_tuning", harmless=(None, {})),
    **_unsupported("positions start at 0; set opt_pos_emb_offset: 0", "opt_pos_emb_offset", harmless=(None, 0)),
    **_unsupported("fp8 is not implemented; remove the key", "te_fp8_mha"),
    **_unsupported("set train_data_weights instead", "weight_by_num_documents"),
    **_unsupported("the loss includes every target; set eod_mask_loss: false", "eod_mask_loss"),
    **_unsupported("GPT-NeoX uses it in the reward loss only; set z_loss: 0", "z_loss", harmless=(None, 0, 0.0)),
    **_unsupported("set train_iters, the length in steps", "train_epochs", harmless=(None,)),
    **_unsupported(
        "stop the run with a signal, which saves a checkpoint, or reduce train_iters", "exit_interval", harmless=(None,)
    ),
    **_unsupported("the loss scale is dynamic; set loss_scale: 0", "loss_scale", harmless=(None, 0, 0.0)),
    **_unsupported("set finetune: true to start from weights only", "no_load_optim"),
    **_unsupported("set lr_decay_style, warmup and min_lr instead", "scheduler", harmless=(None, {})),
    **_unsupported("set precision: bfloat16 or fp16", "amp", harmless=(None, {}, {"enabled": False})),
    **_unsupported(
        "DeepSpeed removed the feature; remove the key",
        "sparse_gradients",
        "elasticity",
        "compression_training",
        harmless=(None, False, {}),
    ),
    **_unsupported(
        "DeepSpeed removed the feature; remove the key",
        "curriculum_learning",
        "sparse_attention",
        harmless=(None, {}, {"enabled": False}),
    ),
    **_unsupported("copy completed checkpoints with another tool", "s3_path", harmless=(None,)),
    **_unsupported("not a key of GPT-NeoX; set num_kv_heads", "attention_type", harmless=(None,)),
    **_unsupported("not a key of GPT-NeoX; set warmup, a fraction of lr_decay_iters", "warmup_iters", harmless=(None,)),
    **_unsupported("not a key of GPT-NeoX; set min_lr", "decay_lr_to", harmless=(None,)),
    **_unsupported(
        "not a key of GPT-NeoX; for a Llama MLP set activation: swiglu and intermediate_size",
        "mlp_type",
        harmless=(None, "regular"),
    ),
    **_unsupported("only decoders are implemented; set model_arch: gpt2", "model_arch", harmless=(None, "gpt2")),
}

# key of GPT-NeoX -> how it is translated
GPT_NEOX_KEYS: dict[str, KeyRule] = {
    **ARCHITECTURE,
    **VOCABULARY,
    **OPTIMIZER,
    **TRAINING,
    **DATA,
    **POST_TRAINING,
    **DEEPSPEED,
    **IGNORED,
    **UNSUPPORTED,
}

# required for a model, in GPT-NeoX too
REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
