"""Every key of GPT-NeoX's YAML files: what it means here.

Four kinds of rows. renamed: the value stands under another key. translated: neox/config/gpt_neox/files.py works the native values out
of it, together with others. ignored: it changes nothing here, `why` says why. unsupported: an error that says what to do, unless
the value is one that has no effect upstream either. Names and defaults are those of GPT-NeoX's `neox_arguments`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class KeyRule:
    """One upstream key.

    Attributes:
        kind: what is done with it.
        to: native keys that it decides.
        default: upstream's value where the file does not give one; None: upstream has none.
        text: ignored: why; unsupported: what to do; translated: how.
        harmless: unsupported: values that are accepted because they switch nothing on.
    """

    kind: Literal["renamed", "translated", "ignored", "unsupported"]
    to: tuple[str, ...] = ()
    default: Any = None
    text: str = ""
    harmless: tuple[Any, ...] = ()


def _renamed(to: str, default: Any = None) -> KeyRule:
    return KeyRule("renamed", (to,), default)


def _translated(to: str, how: str, default: Any = None) -> KeyRule:
    return KeyRule("translated", tuple(to.split()), default, how)


def _unsupported(do: str, *names: str, harmless: tuple[Any, ...] = (None, False)) -> dict[str, KeyRule]:
    row = KeyRule("unsupported", text=do, harmless=harmless)
    return dict.fromkeys(names, row)


ARCHITECTURE = {
    "num_layers": _renamed("model.num_layers"),
    "hidden_size": _renamed("model.hidden_size"),
    "num_attention_heads": _renamed("model.num_attention_heads"),
    "num_kv_heads": _renamed("model.num_kv_heads"),
    "max_position_embeddings": _renamed("model.max_position_embeddings"),
    "gpt_j_residual": _renamed("model.parallel_residual", False),
    "gpt_j_tied": _translated("model.shared_residual_norm", "true where gpt_j_residual is too", False),
    "hidden_dropout": _renamed("model.hidden_dropout", 0.0),
    "attention_dropout": _renamed("model.attention_dropout", 0.0),
    "init_method_std": _renamed("model.init_std", 0.02),
    "init_method": _translated("model.init", "same name", "normal"),
    "output_layer_init_method": _translated("model.output_init", "same name", "scaled_normal"),
    "use_bias_in_attn_linear": _translated("model.qkv_bias model.attention_out_bias", "same value for both", True),
    "use_bias_in_mlp": _renamed("model.mlp_bias", True),
    "use_bias_in_norms": _translated("model.norm", "false needs a norm without a bias: rmsnorm", True),
    "norm": _translated("model.norm", "layernorm, rmsnorm, and their te_ forms", "layernorm"),
    "layernorm_epsilon": _translated("model.norm_eps", "with layernorm", 1e-5),
    "rms_norm_epsilon": _translated("model.norm_eps", "with rmsnorm", 1e-8),
    "activation": _translated("model.activation", "gelu is gelu_tanh with bias_gelu_fusion; swish is silu", "gelu"),
    "bias_gelu_fusion": _translated("model.activation", "upstream's fused kernel computes the tanh form", False),
    "onnx_safe": _translated("model.activation", "gelu in the erf form", False),
    "intermediate_size": _translated("model.intermediate_size", "gated: a third of it, rounded up to mlp_multiple_of", None),
    "expansion_factor": _translated("model.intermediate_size", "x hidden_size"),
    "mlp_multiple_of": _translated("model.intermediate_size", "the width is rounded up to a multiple", 1),
    "pos_emb": _translated("model.position_embedding", "rotary, learned, alibi, none", "learned"),
    "rotary_pct": _translated("model.rotary_pct", "with pos_emb: rotary", 1.0),
    "rotary_emb_base": _translated("model.rope_theta", "with pos_emb: rotary", 10000),
    "no_weight_tying": _translated("model.tie_embeddings", "the opposite", False),
    "sliding_window_width": _translated("model.sliding_window", "+ 1: upstream's window (w, -1) does not count the query itself"),
    "attention_config": _translated("model.sliding_window", "global or flash in every layer"),
    "use_qk_layernorm": KeyRule("unsupported", text="our query/key norm is an RMSNorm per head (model.qk_norm): another model", harmless=(None, False)),
    "precision": _translated("precision.dtype", "fp32, bfloat16, fp16"),
}
VOCABULARY = {
    "tokenizer_type": _translated("model.vocab_size tokenizer.file", "HFTokenizer reads vocab_file; GPT2BPETokenizer has 50,257 ids", "GPT2BPETokenizer"),
    "vocab_file": _translated("tokenizer.file model.vocab_size", "with HFTokenizer"),
    "make_vocab_size_divisible_by": _translated("model.vocab_size", "ids are padded to a multiple of this x model_parallel_size", 128),
}
OPTIMIZER = {
    "optimizer": _translated("optimizer", "type and params; Adam decouples the weight decay upstream too", {"type": "Adam", "params": {"lr": 0.001}}),
    "weight_decay": _translated("optimizer.weight_decay", "same", 0.1),
    "gradient_clipping": _translated("optimizer.gradient_clipping", "same", 1.0),
    "clip_grad": _translated("optimizer.gradient_clipping", "same as gradient_clipping"),
    "lr_decay_style": _translated("schedule.type schedule.rule", "constant, linear, cosine, by rule: gpt_neox", "linear"),
    "lr_decay_iters": _translated("schedule.decay_iters", "same; wins over lr_decay_fraction"),
    "lr_decay_fraction": _translated("schedule.decay_iters", "x train_iters, rounded down"),
    "min_lr": _translated("schedule.min_lr", "same; 0 with a constant rate", 0.0),
    "warmup": _translated("schedule.warmup_iters", "x lr_decay_iters, or train_iters without; not rounded", 0.01),
    "fp16": _translated("precision", "enabled, initial_scale_power, loss_scale_window, min_loss_scale"),
    "bf16": _translated("precision.dtype", "enabled"),
    "zero_optimization": _translated("zero.stage deepspeed.zero_optimization", "stage; the rest goes to DeepSpeed as it is", {"stage": 0}),
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
        "parallel.tensor optimizer.row_bias_lr_multiplier", "0 is 1; the learning rate of biases that gpt_j_residual adds on every rank", 1
    ),
    "pipe_parallel_size": _translated("parallel.pipeline", "0 is 1", 0),
    "sequence_parallel": _translated("parallel.sequence", "no effect with model_parallel_size 1", False),
    "eval_interval": _translated("evaluate.interval", "same; eval_iters: 0 switches it off", 1000),
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
    "use_wandb": _translated("logging.wandb", "true: record there", None),
    "wandb_project": _translated("logging.wandb.project", "with use_wandb", "neox"),
    "wandb_group": _translated("logging.wandb.group", "with use_wandb"),
    "wandb_run_name": _translated("logging.wandb.name", "with use_wandb"),
    "wandb_team": _translated("logging.wandb.entity", "with use_wandb"),
    "wandb_host": _translated("logging.wandb.host", "with use_wandb; not where it is the public server"),
    "use_comet": _translated("logging.comet", "true: record there", None),
    "comet_project": _translated("logging.comet.project", "with use_comet", "neox"),
    "comet_workspace": _translated("logging.comet.workspace", "with use_comet"),
    "comet_experiment_name": _translated("logging.comet.name", "with use_comet"),
    "comet_tags": _translated("logging.comet.tags", "with use_comet"),
    "save": _translated("run.dir", "the run's folder; checkpoints lie in run.dir/checkpoints"),
    "load": _translated("checkpoint.resume checkpoint.init_from", "as save: resume auto; with finetune: init_from; else resume PATH"),
    "finetune": _translated("checkpoint.init_from", "starts at step 0 from the weights that load names", False),
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
    "pack_impl": _translated("data.packing data.order", "packed: concatenate; pack_until_overflow: best_fit; unpacked: document", "packed"),
    "dpo_beta": _translated("train.dpo_beta", "with train_impl: dpo", 0.1),
    **{f"{part}_label_data_paths": _translated(f"data.{ours}", "labels") for part, ours in PARTS.items()},
    **{f"pos_{part}_data_paths": _translated(f"data.{ours}", "path") for part, ours in PARTS.items()},
    **{f"pos_{part}_label_data_paths": _translated(f"data.{ours}", "labels") for part, ours in PARTS.items()},
    **{f"neg_{part}_data_paths": _translated(f"data.{ours}", "rejected") for part, ours in PARTS.items()},
    **{f"neg_{part}_label_data_paths": _translated(f"data.{ours}", "rejected_labels") for part, ours in PARTS.items()},
}

DEEPSPEED = {
    name: _translated(f"deepspeed.{name}", "handed on")
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
} | {"deepspeed_extra_args": _translated("deepspeed", "handed on, key by key")}

# why -> the keys that change nothing here
IGNORED_BECAUSE = {
    "our kernels are fused, always, and compute the same": """
        scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion bias_dropout_fusion rope_fusion layernorm_fusion
        rmsnorm_fusion use_flashattn_swiglu
    """,
    "scores, softmax and loss are in fp32, always": "dpo_fp32 attention_softmax_in_fp32 apply_query_key_layer_scaling fp16_lm_cross_entropy",
    "gradients are accumulated and reduced in fp32, always": "fp32_allreduce data_types",
    "the output projection is cut over the vocabulary, always": "output_layer_parallelism",
    "initial weights depend on no device": "use_cpu_initialization",
    "rotary tables are computed, not stored": "rotary_save_freqs_buffer",
    "used by an architecture that attention_config would name": """
        gmlp_attn_dim sparsity_config dim_att head_size ffn_dim mamba_selective_scan_fusion mamba_causal_conv_fusion
        mamba_inner_func_fusion mamba_selective_fp32_params mamba_use_bias_in_conv mamba_use_bias_in_linears
    """,
    "used by other values of norm and pos_emb": "scalenorm_epsilon rpe_num_buckets rpe_max_distance",
    "used with num_unique_layers, which is an error": "param_sharing_style",
    "follows from other keys": """
        padded_vocab_size optimizer_type lr zero_stage zero_reduce_scatter zero_contiguous_gradients zero_reduce_bucket_size
        zero_allgather_bucket_size is_pipe_parallel dynamic_loss_scale curriculum_seqlen config_files git_hash iteration do_train do_valid
        do_test save_iters tokenizer tensorboard_writer adlr_autoresume_object comet_experiment comet_experiment_key
    """,
    "stages are balanced by what their layers cost": "pipe_partition_method",
    "moments are kept in fp32: more memory, no other update": "use_bnb_optimizer",
    "the launcher's: give it to `deepspeed`, torchrun or srun": """
        hostfile exclude num_nodes num_gpus master_port master_addr launcher force_multi detect_nvlink_pairs comment autotuning_run
        no_ssh_check user_script deepspeed_mpi deepspeed_slurm local_rank rank world_size global_num_gpus include account lazy_mpu_init
    """,
    "DeepSpeed is always used": "deepspeed deepscale deepscale_config",
    "NCCL on GPUs, gloo on CPUs": "distributed_backend",
    "a whole block is the unit of recomputation, its input stays where it is": """
        checkpoint_num_layers partition_activations contiguous_checkpointing synchronize_each_layer deepspeed_activation_checkpointing
        checkpoint_in_cpu profile_backward activation_checkpointing
    """,
    "datasets are mapped into memory, one way for all": "data_impl mmap_warmup use_shared_fs num_workers",
    "documents longer than a sample are cut; samples have one length": "allow_chopped short_seq_prob",
    "merges are in the tokenizer's JSON file": "merge_file",
    "metrics.jsonl has the times of every step; logging.interval prints them": "steps_per_print wall_clock_breakdown",
    "metrics.jsonl has the gradient's norm of every step": "log_grad_norm",
    "not recorded": """
        log_grad_pct_zeros log_param_norm log_optimizer_states log_gradient_noise_scale gradient_noise_scale_n_batches
        gradient_noise_scale_cpu_offload char_level_ppl log_memory_stats
    """,
    "log.txt is in run.dir": "log_dir",
    "TensorBoard's files are in run.dir/tensorboard": "tensorboard_dir tensorboard",
    "fp16's hysteresis and scales are read from fp16": "hysteresis loss_scale_window min_scale",
    "checkpoints are whole, checked by checksums, and of one format": """
        no_save_optim no_save_rng no_load_rng checkpoint checkpoint_validation_with_forward_pass load_universal s3_chunk_size
    """,
    "resuming takes the schedule of the config": "override_lr_scheduler use_checkpoint_lr_scheduler",
    "a signal is answered after the step, with a checkpoint": "adlr_autoresume adlr_autoresume_interval",
    "an option of neox generate": """
        text_gen_type temperature top_p top_k maximum_tokens prompt_end sample_input_file sample_output_file num_samples recompute
        return_logits precompute_model_name
    """,
    "an option of neox evaluate": "eval_results_prefix eval_tasks",
    "used with moe_num_experts above 1, which is an error": """
        moe_top_k use_tutel moe_loss_coeff moe_train_capacity_factor moe_glu moe_eval_capacity_factor moe_min_capacity moe_token_dropping
        moe_type create_moe_param_group moe_use_residual moe_expert_parallel_size moe_lbl_in_fp32 moe_jitter_eps
        enable_expert_tensor_parallelism expert_interval moe_expert_interval moe_router_type
    """,
    "used with use_mup, which is an error": """
        coord_check save_base_shapes base_shapes_file mup_init_scale mup_attn_temp mup_output_temp mup_embedding_mult
        mup_rp_embedding_mult mup_width_scale mup_hp_search
    """,
    "used with weight_by_num_documents, which is an error": "weighted_sampler_alpha weighted_document_limit",
    "the reference's log-probabilities are computed before the first step, always": "precompute_logprobs",
    "used with train_impl, whose other values are errors": """
        kto_fp32 kto_beta kl_impl kto_desirable_weight kto_undesirable_weight fp32_reinforce
        kl_div_beta reinforce_leave_one_out serve_model_weights online_dataserver_ips online_dataserver_ports
        weight_server_port
    """,
    "kernels are compiled when the package is installed": "fused_kernels_build_path",
    "MFU is measured against the device's peak, which is looked up or measured": "peak_theoretical_tflops",
    "used with te_ layers, whose switches are errors where fp8 changes results": """
        te_fp8_format te_fp8_wgrad te_fp8_margin te_fp8_amax_history_len te_fp8_amax_compute_algo
    """,
    "our kernels take the place of Transformer Engine's, without fp8": "te_columnparallel te_rowparallel te_layernorm_mlp te_mha",
    "the first process alone speaks to Weights & Biases": "wandb_init_all_ranks",
    "the whole config is shown with the experiment": "comet_others",
    "traces lie in run.dir/profile": "memory_profiling_path",
}
IGNORED = {name: KeyRule("ignored", text=why) for why, names in IGNORED_BECAUSE.items() for name in names.split()}

UNSUPPORTED = {
    **_unsupported("KTO and REINFORCE are not built: train_impl: dpo", *(f"{part}_reward_data_paths" for part in PARTS), harmless=(None, [])),
    **_unsupported("the loss is measured against the weights at the start: take it out", "dpo_reference_free"),
    **_unsupported("mixtures of experts are not built: moe_num_experts: 1", "moe_num_experts", harmless=(None, 1)),
    **_unsupported("muP is not built: use_mup: false", "use_mup"),
    **_unsupported("shared layers are not built: take it out", "num_unique_layers", harmless=(None,)),
    **_unsupported("soft prompts are not trained: take it out", "soft_prompt_tuning", harmless=(None, {})),
    **_unsupported("positions start at 0: opt_pos_emb_offset: 0", "opt_pos_emb_offset", harmless=(None, 0)),
    **_unsupported("fp8 is not computed: take it out", "te_fp8_mha"),
    **_unsupported("name the weights: train_data_weights", "weight_by_num_documents"),
    **_unsupported("every target counts: eod_mask_loss: false", "eod_mask_loss"),
    **_unsupported("only the reward model's loss has it upstream: z_loss: 0", "z_loss", harmless=(None, 0, 0.0)),
    **_unsupported("give the length in steps: train_iters", "train_epochs", harmless=(None,)),
    **_unsupported("stop the run by a signal, it saves and resumes; or lower train_iters", "exit_interval", harmless=(None,)),
    **_unsupported("the loss scale is dynamic: loss_scale: 0", "loss_scale", harmless=(None, 0, 0.0)),
    **_unsupported("start from weights alone with finetune: true", "no_load_optim"),
    **_unsupported("schedules are ours: lr_decay_style, warmup, min_lr", "scheduler", harmless=(None, {})),
    **_unsupported("set precision: bfloat16 or fp16", "amp", harmless=(None, {}, {"enabled": False})),
    **_unsupported("DeepSpeed removed it: take it out", "sparse_gradients", "elasticity", "compression_training", harmless=(None, False, {})),
    **_unsupported("DeepSpeed removed it: take it out", "curriculum_learning", "sparse_attention", harmless=(None, {}, {"enabled": False})),
    **_unsupported("copy finished checkpoints with a tool of your own", "s3_path", harmless=(None,)),
    **_unsupported("not a key of GPT-NeoX: num_kv_heads alone decides", "attention_type", harmless=(None,)),
    **_unsupported("not a key of GPT-NeoX: give warmup as a share of lr_decay_iters", "warmup_iters", harmless=(None,)),
    **_unsupported("not a key of GPT-NeoX: give min_lr", "decay_lr_to", harmless=(None,)),
    **_unsupported("not a key of GPT-NeoX: for a Llama MLP give activation: swiglu and intermediate_size", "mlp_type", harmless=(None, "regular")),
    **_unsupported("only decoders are built: model_arch: gpt2", "model_arch", harmless=(None, "gpt2")),
}

# upstream key -> what is done with it
GPT_NEOX_KEYS: dict[str, KeyRule] = {**ARCHITECTURE, **VOCABULARY, **OPTIMIZER, **TRAINING, **DATA, **POST_TRAINING, **DEEPSPEED, **IGNORED, **UNSUPPORTED}

# what a model cannot be built without; upstream names the same four
REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
