"""Tasks of lm-evaluation-harness (EleutherAI, 0.4) on our models. An optional extra: pip install neox-train[eval].

Texts are encoded as its `hf` model encodes them, so that the numbers are the same: with the tokenizer's own template (a
leading <s> where it has one), trailing spaces of a context moved to the continuation, an empty context replaced by the
beginning-of-text token.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from neox.data.text.tokenizer import Tokenizer
from neox.errors import ConfigError, DataError, EnvironmentProblem
from neox.evaluate.scoring import complete, log_likelihoods, rolling_windows
from neox.files import JsonObject, read_json
from neox.generate.sampling import SamplingParams
from neox.model.gpt import GPT

if TYPE_CHECKING:  # an optional package, and slow to import
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

DEFAULT_NEW_TOKENS = 256  # the default of lm-evaluation-harness


def prefix_token(tokenizer: Tokenizer) -> int:
    """The token used as an empty context: bos_token of tokenizer_config.json, else end-of-document.

    Raises:
        ConfigError: neither exists.
    """
    settings = Path(tokenizer.file).with_name("tokenizer_config.json")
    if settings.is_file():
        try:
            name = read_json(settings).get("bos_token")
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(
                "cannot read the tokenizer's settings", where=settings, got=error, want="a JSON object"
            ) from error
        found = tokenizer.token_id(name.get("content", "") if isinstance(name, dict) else name) if name else None
        if found is not None:
            return found
    if tokenizer.eod_id is None:
        raise ConfigError(
            "the tokenizer has no end-of-document token", where=tokenizer.file, do="set tokenizer.eod_token"
        )
    return tokenizer.eod_id


def sampling(options: JsonObject) -> tuple[SamplingParams, list[str]]:
    """A task's generation_kwargs as sampling parameters and stop texts.

    Raises:
        ConfigError: an unsupported option.
    """
    known = {
        "until",
        "do_sample",
        "temperature",
        "top_p",
        "top_k",
        "max_gen_toks",
        "max_new_tokens",
        "max_tokens",
        "num_beams",
    }
    unknown = sorted(set(options) - known)
    if unknown or options.get("num_beams", 1) != 1:
        raise ConfigError(
            "generation option of the task is not supported",
            where="generation_kwargs",
            got=", ".join(unknown) or "num_beams",
        )
    until = options.get("until") or []
    sampled = options.get("do_sample", bool(options.get("temperature")))
    count = next(
        (options[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if options.get(name)),
        DEFAULT_NEW_TOKENS,
    )
    params = SamplingParams(
        temperature=float(options.get("temperature") or 1.0) if sampled else 0.0,
        top_k=options.get("top_k") or None,
        top_p=options.get("top_p") or None,
        max_new_tokens=int(count),
    )
    return params, [until] if isinstance(until, str) else list(until)


def harness_model(model: GPT, tokenizer: Tokenizer, batch_size: int) -> LM:
    """An adapter that lm-evaluation-harness uses as its model.

    Raises:
        EnvironmentProblem: lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM  # an optional package, only here
    except ImportError as error:
        raise EnvironmentProblem(
            "lm-evaluation-harness is not installed", got=error, do="pip install 'lm-eval==0.4.13' -c constraints.txt"
        ) from error

    prefix = prefix_token(tokenizer)
    prefix_text = tokenizer.decode([prefix])
    max_length = model.config.max_position_embeddings
    end = tokenizer.eod_id if tokenizer.eod_id is not None else prefix

    class NeoxModel(TemplateLM):
        """What the harness calls."""

        eot_token_id = property(lambda self: end)
        prefix_token_id = property(lambda self: prefix)
        tokenizer_name = property(lambda self: tokenizer.file)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
            template = not string.startswith(prefix_text) if add_special_tokens is None else add_special_tokens
            return tokenizer.encode(string, template=template)

        def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return log_likelihoods(model, pairs, max_length=max_length, batch_size=batch_size)

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            windows = [rolling_windows(self.tok_encode(request.args[0]), prefix, max_length) for request in requests]
            scores = iter(
                log_likelihoods(
                    model, [pair for text in windows for pair in text], max_length=max_length, batch_size=batch_size
                )
            )
            return [sum(next(scores)[0] for _ in text) for text in windows]

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            answers = [""] * len(requests)
            for options, members in group_by_options([request.args[1] for request in requests]):
                texts = continuations(
                    model, tokenizer, [self.tok_encode(requests[i].args[0]) for i in members], options, batch_size
                )
                for i, text in zip(members, texts, strict=True):
                    answers[i] = text
            return answers

    return NeoxModel()


def group_by_options(options: Sequence[JsonObject]) -> list[tuple[JsonObject, list[int]]]:
    """(options, numbers of the requests that have them) for each distinct set of options."""
    groups: dict[str, list[int]] = {}
    for i, each in enumerate(options):
        groups.setdefault(json.dumps(each, sort_keys=True, default=str), []).append(i)
    return [(options[members[0]], members) for members in groups.values()]


def continuations(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], options: JsonObject, batch_size: int
) -> list[str]:
    """The texts that a task requests; the beginning of prompts that are too long is dropped.

    Raises:
        ConfigError: the task generates more tokens than the model reads.
    """
    params, stops = sampling(options)
    room = model.config.max_position_embeddings - params.max_new_tokens
    if room <= 0:
        want = f"< {model.config.max_position_embeddings}"
        raise ConfigError(
            "the task generates more tokens than the model reads",
            where="max_gen_toks",
            got=params.max_new_tokens,
            want=want,
        )

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    cut_prompts = [prompt[-room:] for prompt in prompts]
    return complete(
        model, cut_prompts, params, decode=decode, stops=stops, eod_id=tokenizer.end_ids, batch_size=batch_size
    )


def run_tasks(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    task_files: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> JsonObject:
    """Evaluate on tasks of lm-evaluation-harness.

    Args:
        model: in evaluation mode.
        tokenizer: of its training data.
        tasks: names of tasks or groups.
        task_files: folder of further task YAML files; tasks in it need no network.
        num_fewshot: examples before each question; None: the default of the task.
        limit: questions of each task; None: all.
        batch_size: texts of one forward pass.

    Returns:
        the harness's results: {"results": {task: {"acc,none": ..., ...}}, "n-samples": ..., "versions": ...}.

    Raises:
        EnvironmentProblem: lm-evaluation-harness is not installed.
        ConfigError: no such task.
        DataError: a task's data cannot be loaded.
    """
    adapter = harness_model(model, tokenizer, batch_size)
    from lm_eval import simple_evaluate  # optional, and slow to import

    manager = find_tasks(tasks, task_files)
    try:
        # its decorator hides the signature
        evaluate = cast(Callable[..., Mapping[str, object] | None], simple_evaluate)
        found = evaluate(
            adapter,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
            verbosity="WARNING",
        )
        results = found or {}  # None on all ranks but 0 of a process group
    except (OSError, ConnectionError, ValueError) as error:
        raise DataError(
            "a task could not be evaluated",
            where=", ".join(tasks),
            got=error,
            do="without network, give local files with --task-files",
        ) from error
    return {key: results[key] for key in ("results", "groups", "n-samples", "n-shot", "versions") if key in results}


def find_tasks(tasks: Sequence[str], task_files: str | None) -> TaskManager:
    """The harness's tasks that include `tasks`: those of a folder, and its own if the folder does not have all of them.

    Raises:
        ConfigError: no such task.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=task_files, include_defaults=False) if task_files else TaskManager()
    if task_files and not all(task in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=task_files)
    missing = [task for task in tasks if task not in manager.all_tasks]
    if missing:
        close = difflib.get_close_matches(missing[0], manager.all_tasks, 1)
        raise ConfigError(
            "no such task",
            where="--tasks",
            got=", ".join(missing),
            want="tasks of lm-evaluation-harness or --task-files",
            do=f"did you mean {close[0]}?" if close else "lm_eval ls tasks",
        )
    return manager
