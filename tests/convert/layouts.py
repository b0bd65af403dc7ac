"""What each of four processes runs for the conversion tests: imported checkpoints read, and written again, in every
layout.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from neox.checkpoint.consensus import RankGroup
from neox.checkpoint.find import resolve
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.retention import start_lineage
from neox.checkpoint.save import Content, save
from neox.config.schema import Config
from neox.config.values import dump, to_builtins
from neox.engine.engine import Engine
from neox.generate.generate import load_model
from neox.model import pipeline
from neox.model.gpt import GPT
from neox.parallel.mesh import create_mesh

os.environ.setdefault("LOCAL_RANK", "0")

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))  # tensor, pipeline


def read_and_write(folder: str) -> None:
    """For every model below `folder`: folder/NAME/logits-TP-PP.npy, and a checkpoint in folder/NAME/TP-PP written by
    that layout.
    """
    dist.init_process_group("gloo")
    meshes = {layout: create_mesh(*layout) for layout in LAYOUTS}
    for place in sorted(Path(folder).iterdir()):
        tokens = torch.from_numpy(np.load(place / "tokens.npy"))
        path = resolve(place / "ours")
        for (tp, pp), mesh in meshes.items():
            with torch.no_grad():
                logits = pipeline.logits(load_model(path, mesh=mesh), tokens)
            if mesh.rank == 0:
                np.save(place / f"logits-{tp}-{pp}.npy", logits.numpy())
            write(path, place / f"{tp}-{pp}" / "checkpoints", mesh)
    dist.destroy_process_group()


def write(path: Path, root: Path, mesh) -> None:
    """Take the weights of a checkpoint into a training engine of this layout, and save them from there."""
    with Checkpoint(path) as checkpoint:
        model = Config.model_validate({"model": checkpoint.model_config}).model
        config = Config.model_validate(
            {
                "model": to_builtins(model),
                "precision": {"dtype": "fp32"},
                "zero": {"stage": 1},
                "parallel": {"tensor": mesh.tp, "pipeline": mesh.pp},
                "train": {"micro_batch_size": 1},
            }
        )
        engine = Engine(config, mesh, GPT(model, mesh))
        engine.take_weights(checkpoint)
    save(
        root,
        Content(
            1,
            engine.state_dict() | {"step": 1, "consumed": 0, "tokens": 0},
            start_lineage(root),
            config_lock=dump(config),
            model_config=to_builtins(model),
        ),
        engine.fragments(),
        ranks=RankGroup(mesh.rank, mesh.world_size),
    )
