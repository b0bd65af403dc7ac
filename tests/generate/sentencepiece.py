"""A small tokenizer of SentencePiece's form (Llama 2): words begin with U+2581, other letters are bytes, the first
space is dropped when decoding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXT = "river stone morning quiet engine letter window garden paper silver winter summer captain market bridge forest "
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def write_tokenizer(
    folder: Path, *, bos: str = "<s>", eos: str = "</s>", template: bool = True, **settings: Any
) -> Path:
    """Write tokenizer.json and tokenizer_config.json; ids: 0 unk, 1 bos, 2 eos. Returns the file."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>", bos, eos, *BYTES], show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    content = json.loads(tokenizer.to_str())
    space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    content["decoder"] = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in ("<unk>", bos, eos)]
    if template:
        single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        specials = {bos: {"id": bos, "ids": [1], "tokens": [bos]}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single,
            "special_tokens": specials,
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    base = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(base | settings), encoding="utf-8")
    return folder / "tokenizer.json"
