"""A small tokenizer of the form of GPT-NeoX's and Pythia's: byte-level BPE on NFC, two special tokens first, and runs
of spaces as added tokens after the vocabulary.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ("<|endoftext|>", "<|padding|>")
SPACES = [" " * n for n in range(24, 1, -1)]
TEXT = "The quick brown fox jumps over the lazy dog, 12 times a day.\n    return données[日本語] + 1\n"


def write_gpt_neox_tokenizer(path: Path, size: int = 300) -> Path:
    """Write it with `size` ids besides the runs of spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    tokenizer.add_tokens([AddedToken(run, normalized=True) for run in SPACES])
    tokenizer.save(str(path))
    return path
