"""One rank of the original GPT-NeoX, training on a CPU: `python upstream.py CHECKOUT JOB.json`, started by compare.py
for each rank.

The code of the checkout runs unchanged. What a CPU lacks is substituted at run time, in this process only: the few
calls of torch.cuda that GPT-NeoX makes, Apex's fused Adam (torch's AdamW computes the same), and modules that it
imports but does not use here. JOB names the YAML files, the folder for the results, and the probe tokens. Rank 0 writes
`losses.json`, and the rank that gathers the logits of the probe after the last step writes `logits.npy`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import numpy
import packaging.version
import torch
import transformers  # noqa: F401 imported before the empty modules, because it inspects what is installed

UNUSED = (
    "boto3",
    "ftfy",
    "hf_transfer",
    "lm_dataformat",
    "sentencepiece",
    "tiktoken",
    "mpi4py",
    "best_download",
    "lm_eval",
)


def patch_cuda(world_size: int) -> None:
    """Replace the functions of torch.cuda that GPT-NeoX calls on any device."""
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: world_size
    cuda.current_device = lambda: torch.device("cpu")
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.LongTensor = torch.LongTensor
    cuda.get_rng_state = torch.get_rng_state
    cuda.set_rng_state = torch.set_rng_state
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "reset_peak_memory_stats",
    ):
        setattr(cuda, name, lambda *_: 0)
    torch.Tensor.cuda = lambda self, *_, **__: self


def add_missing_modules() -> None:
    """Substitute Apex's fused Adam, and add empty modules for packages that are imported but not used."""
    from torch.optim import AdamW

    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = type("FusedAdam", (AdamW,), {})
    apex.optimizers = optimizers
    resources = types.ModuleType("pkg_resources")  # recent setuptools lack it
    resources.packaging = packaging
    sys.modules |= {"apex": apex, "apex.optimizers": optimizers, "pkg_resources": resources}
    for name in UNUSED:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)


def write_data(prefix: Path, documents: list[list[int]]) -> None:
    """Write a dataset with GPT-NeoX's builder."""
    from megatron.data.indexed_dataset import MMapIndexedDatasetBuilder

    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for document in documents:
        builder.add_item(numpy.array(document, numpy.uint16))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def pipeline_logits(model, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits of this rank's shard of the vocabulary, on the last stage. They are copied, because the loss
    overwrites them.
    """
    copies, micro_batches = [], model.micro_batches
    model.micro_batches, model.first_output_send, model.pipe_recv_buf = 1, True, None
    if model.is_last_stage():
        compute = model.module.loss_fn

        def copy_and_compute(logits, labels):
            copies.append(logits.clone())
            return compute(logits, labels)

        model.module.loss_fn = copy_and_compute
    model.eval_batch(iter([{"text": torch.nn.functional.pad(tokens, (0, 1))}]))
    model.micro_batches = micro_batches
    return copies[0] if copies else None


def probe(args, model, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits of the probe tokens over the full vocabulary; None on ranks that do not gather them."""
    from megatron import mpu
    from megatron.utils import get_ltor_masks_and_position_ids

    model.eval()
    with torch.no_grad():
        if args.is_pipe_parallel:
            logits = pipeline_logits(model, tokens)
        else:
            mask, _, positions = get_ltor_masks_and_position_ids(
                tokens, 0, sliding_window_width=args.sliding_window_width
            )
            logits = model.module((tokens, positions, mask))
    model.train()
    if logits is None:
        return None
    shards = [torch.empty_like(logits) for _ in range(mpu.get_model_parallel_world_size())]
    torch.distributed.all_gather(shards, logits.contiguous(), group=mpu.get_model_parallel_group())
    return torch.cat(shards, dim=-1) if mpu.get_model_parallel_rank() == 0 else None


def train(job: dict, rank: int, world_size: int) -> None:
    """Train as the YAML files specify, and write the results."""
    import deepspeed
    from megatron import training
    from megatron.neox_arguments import NeoXArgs

    out, losses = Path(job["out"]), []
    save, initialize = training.save_checkpoint, deepspeed.initialize
    args = NeoXArgs.from_ymls(job["conf"], overwrite_values={"global_num_gpus": world_size})

    def save_and_probe(neox_args, iteration: int, model, optimizer, lr_scheduler) -> None:
        save(neox_args, iteration, model, optimizer, lr_scheduler)
        if iteration == neox_args.train_iters:
            logits = probe(neox_args, model, torch.tensor(job["tokens"]))
            if logits is not None:
                numpy.save(out / "logits.npy", logits.float().numpy())

    def initialize_with_config(model, optimizer, args, lr_scheduler, dist_init_required, model_parameters, mpu):
        given = {
            "model": model,
            "optimizer": optimizer,
            "model_parameters": model_parameters,
            "lr_scheduler": lr_scheduler,
            "mpu": mpu,
        }
        # without args: there deepspeed_config is a property of GPT-NeoX, not an option of the command line
        return initialize(**given, dist_init_required=dist_init_required, config=args.deepspeed_config)

    training.save_checkpoint = save_and_probe
    training.collect_loss_for_unit_test = lambda loss: losses.append(float(loss))
    deepspeed.initialize = initialize_with_config
    args.configure_distributed_args()
    args.build_tokenizer()
    args.initialize_tensorboard_writer()
    training.pretrain(neox_args=args)
    if rank == 0:
        (out / "losses.json").write_text(json.dumps(losses))


def main() -> None:
    """Read the job and run it."""
    checkout, job = Path(sys.argv[1]).resolve(), json.loads(Path(sys.argv[2]).read_text())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the checkout's Makefile calls python3
    sys.path.insert(0, str(checkout))
    os.chdir(checkout)
    torch.set_num_threads(1)
    add_missing_modules()
    if "documents" in job:
        write_data(Path(job["data"]), job["documents"])
        return
    import deepspeed  # before torch.cuda is patched; otherwise DeepSpeed would compile CUDA operators

    deepspeed.get_accelerator()
    patch_cuda(world_size)
    train(job, rank, world_size)
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
