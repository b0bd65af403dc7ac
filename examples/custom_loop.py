"""A training loop of your own on neox's model, data and config: thirty lines that you can change.

python examples/custom_loop.py runs/own/config.yml --steps 20
"""

from __future__ import annotations

import argparse

import torch

import neox
from neox.data import Loader, build_datasets


def train(config: neox.Config, steps: int) -> list[float]:
    """Train for some steps on one device and return the losses; no launcher, DeepSpeed or checkpoint."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = neox.GPT(config.model).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay
    )
    batch_size = config.train.micro_batch_size or 1
    data = build_datasets(config, {"train": steps * batch_size})["train"]
    losses = []
    with Loader(data, micro_batch_size=batch_size, vocab_size=config.model.vocab_size) as loader:
        for _, (batch,) in zip(range(steps), loader, strict=False):
            token_losses = model(batch.tokens.to(device), batch.targets.to(device))  # fp32 [b s]
            loss = token_losses.sum() / (batch.targets != -100).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            print(f"step {len(losses):3}  loss {losses[-1]:.4f}")
    return losses


def main(argv: list[str] | None = None) -> None:
    """Read the config and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    train(neox.load_config(args.config), args.steps)


if __name__ == "__main__":
    main()
