"""Several config problems as one error with one line each, and suggestions for misspelt keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from neox.errors import ConfigError

# Names of keys in other libraries, too different from ours to be taken for typos.
OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "max_steps": "train.train_iters",
    "num_train_steps": "train.train_iters",
    "warmup_steps": "schedule.warmup_iters",
    "batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "num_hidden_layers": "model.num_layers",
    "n_layer": "model.num_layers",
    "n_head": "model.num_attention_heads",
    "n_embd": "model.hidden_size",
    "max_grad_norm": "optimizer.gradient_clipping",
    "clip_grad": "optimizer.gradient_clipping",
    "num_key_value_heads": "model.num_kv_heads",
    "num_query_groups": "model.num_kv_heads",
    "ffn_hidden_size": "model.intermediate_size",
    "rms_norm_eps": "model.norm_eps",
    "layernorm_epsilon": "model.norm_eps",
    "max_seq_length": "data.seq_length",
    "sequence_length": "data.seq_length",
    "save_steps": "checkpoint.save_interval",
    "eval_interval": "evaluate.interval",
    "tensor_parallel_size": "parallel.tensor",
    "tensor_model_parallel_size": "parallel.tensor",
    "model_parallel_size": "parallel.tensor",
    "pipeline_parallel_size": "parallel.pipeline",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "pipe_parallel_size": "parallel.pipeline",
    "context_parallel_size": "parallel.context",
    "sequence_parallel": "parallel.sequence",
    "zero_stage": "zero.stage",
}
SHOWN = 50  # lines of one report; the others are counted


class ConfigErrors(ConfigError):
    """More than one problem. `line()` has one line for each.

    Args:
        problems: the errors, in the order in which they are printed.
    """

    def __init__(self, problems: Sequence[ConfigError]):
        self.problems = tuple(problems)
        first = self.problems[0]
        super().__init__(first.what, where=first.where, got=first.got, want=first.want, do=first.do)

    def line(self) -> str:
        """Return one `error[2] ...` line per problem."""
        lines = [problem.line() for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"error[{self.exit_code}] and {len(self.problems) - SHOWN} more problems like these")
        return "\n".join(lines)


def raise_problems(problems: Iterable[ConfigError]) -> None:
    """Raise the collected problems, without duplicates. Does nothing if there are none.

    Raises:
        ConfigError: the only problem, or a ConfigErrors of all of them.
    """
    distinct = list({problem.line(): problem for problem in problems}.values())
    if len(distinct) == 1:
        raise distinct[0]
    if distinct:
        raise ConfigErrors(distinct)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known dotted key that an unknown one most likely means, or None.

    The same name in another section (wrong nesting) is preferred to a typo in the same section, and that to a typo in
    another section.
    """
    candidates = sorted(known)
    section, _, name = word.rpartition(".")
    name = name.replace("-", "_")
    if OTHER_NAMES.get(name) in candidates:
        return OTHER_NAMES[name]
    same_name = [key for key in candidates if key.rpartition(".")[2] == name]
    if same_name:
        return same_name[0]
    inside = {key.rpartition(".")[2]: key for key in candidates if key.rpartition(".")[0] == section}
    anywhere = {key.rpartition(".")[2]: key for key in reversed(candidates)}
    for pool, cutoff in ((inside, 0.6), (anywhere, 0.75)):
        match = difflib.get_close_matches(name, list(pool), n=1, cutoff=cutoff)
        if match:
            return pool[match[0]]
    return None


def same_word(name: str, known: Iterable[str]) -> list[str]:
    """Return the known flat key of which `name` is a misspelling, ignoring underscores; at most one."""
    bare = {key.replace("_", ""): key for key in sorted(known)}
    return [bare[match] for match in difflib.get_close_matches(name.replace("_", ""), list(bare), n=1, cutoff=0.9)]


def similar_words(name: str, known: Iterable[str]) -> list[str]:
    """Return known flat keys that contain every word of `name`, in any order, and at most as many additional words.

    The keys with the fewest additional words are returned, at most three. A key that shares only some of the words
    means something else: `wandb_run_name` is not `wandb_team`.
    """
    words = name.split("_")
    found = []
    for key in sorted(known):
        rest = key.split("_")
        extra = len(rest) - len(words)
        for word in words:
            match = difflib.get_close_matches(word, rest, n=1, cutoff=0.75)
            if not match:
                break
            rest.remove(match[0])
        else:
            if extra <= len(words):
                found.append((extra, key))
    fewest = min((extra for extra, _ in found), default=0)
    return [key for extra, key in found if extra == fewest][:3]


def yaml_constant(value: object) -> str | None:
    """Return null, true or false for the value that YAML reads from it; None for any other value."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else None


def brief(value: object, limit: int = 80) -> str:
    """Return a short representation of a value, for `got=`, with null, true and false as YAML writes them."""
    text = yaml_constant(value) or repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
