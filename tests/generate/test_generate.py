"""Decoding: with and without the cache, alone and in a batch, against transformers; loading a checkpoint."""

import json

import pytest
import torch
import transformers

from neox.checkpoint.reader import Checkpoint
from neox.config.schema import Config, ModelConfig
from neox.config.values import dump
from neox.convert.huggingface import from_huggingface
from neox.errors import CheckpointError, ConfigError
from neox.evaluate.scoring import log_likelihoods
from neox.generate.generate import check_prompts, generate, load_model
from neox.generate.sampling import SamplingParams, prompt_generator
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.generate.checkpoints import save_model

SHAPE = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "vocab_size": 97, "max_position_embeddings": 64}
ARCHITECTURES = {
    "neox": {"rotary_pct": 0.25, "parallel_residual": True},
    "gpt2": {"position_embedding": "learned", "tie_embeddings": True},
    "llama": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "num_kv_heads": 2,
        "qkv_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    "window": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 1, "sliding_window": 5, "qk_norm": True},
    "alibi": {"position_embedding": "alibi"},
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [42], [3, 1, 4, 1, 5]]


def tiny(name: str, seed: int = 1) -> GPT:
    """A small random model whose logits differ enough that greedy ties don't happen."""
    return GPT(ModelConfig(**SHAPE, **ARCHITECTURES[name], init_std=0.2), Mesh.single(), seed=seed).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "params", [SamplingParams(20, 0), SamplingParams(20, 0.9, top_k=20, top_p=0.9, seed=3)], ids=["greedy", "sampled"]
)
def test_cache_and_batching_change_nothing(name, params):
    model = tiny(name)
    together = generate(model, PROMPTS, params)
    assert together == generate(model, PROMPTS, params, use_cache=False)
    assert [len(tokens) for tokens in together] == [20, 20, 20]
    if params.greedy:
        assert together == [generate(model, [prompt], params)[0] for prompt in PROMPTS]


def test_a_step_reads_one_token_unless_the_cache_is_off():
    model, read = tiny("neox"), []
    hook = model.embedding.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[-1]))
    generate(model, PROMPTS, SamplingParams(4, 0))
    generate(model, PROMPTS, SamplingParams(4, 0), use_cache=False)
    hook.remove()
    assert read == [7, 1, 1, 1, 7, 8, 9, 10]


def test_greedy_equals_transformers():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    model_config, weights = from_huggingface(theirs)
    ours = GPT(model_config, Mesh.single()).eval()
    ours.load_weights(weights)
    for prompt in PROMPTS:
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert generate(ours, [prompt], SamplingParams(30, 0))[0] == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["neox", "llama"])  # neox repeats its end, llama draws other tokens after it
def test_stops_at_end_of_document_and_streams(name):
    model = tiny(name)
    free = generate(model, PROMPTS, SamplingParams(20, 0))
    eod = free[1][4]
    seen: list[tuple[int, int]] = []
    stopped = generate(
        model, PROMPTS, SamplingParams(20, 0), eod_id=eod, on_token=lambda row, token: seen.append((row, token))
    )
    for row in range(3):
        until = free[row].index(eod) if eod in free[row] else 20
        assert stopped[row] == free[row][:until]
        assert [token for r, token in seen if r == row] == stopped[row]


def test_stops_at_each_of_several_ids():
    model = tiny("neox")
    free = generate(model, PROMPTS, SamplingParams(20, 0))
    ends = {free[0][3], free[1][5]}
    for row, tokens in enumerate(generate(model, PROMPTS, SamplingParams(20, 0), eod_id=ends)):
        until = min((i for i, token in enumerate(free[row]) if token in ends), default=20)
        assert tokens == free[row][:until]


@pytest.mark.parametrize("name", ["neox", "gpt2"])
def test_too_many_tokens_are_refused_before_decoding(name):
    model = tiny(name)
    assert len(generate(model, [[1] * 60], SamplingParams(4, 0))[0]) == 4
    model.forward = None
    with pytest.raises(ConfigError, match="more tokens than the model has positions; where=prompt 1"):
        generate(model, [[1], [1] * 60], SamplingParams(5))


def test_dynamic_ntk_does_not_depend_on_the_batch():
    """Neither on the batch nor on the cache, and equal to transformers' at batch 1, which is rotated by the length
    at hand without its cache.
    """
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    config.rope_parameters = rope
    theirs = transformers.LlamaForCausalLM(config).eval()
    model_config, weights = from_huggingface(theirs)
    ours = GPT(model_config, Mesh.single()).eval()
    ours.load_weights(weights)
    # below 16 positions, beyond them on the way, beyond from the start
    prompts = [[3, 1, 4], list(range(5, 17)), list(range(30, 60))]
    together = generate(ours, prompts, SamplingParams(10, 0))
    assert together == generate(ours, prompts, SamplingParams(10, 0), use_cache=False)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert generate(ours, [prompt], SamplingParams(10, 0))[0] == tokens
        expected = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=False,
        )
        assert tokens == expected[0, len(prompt) :].tolist()
    pairs = [(prompt, [7, 8]) for prompt in prompts]
    scores = [log_likelihoods(ours, [pair], max_length=64, batch_size=1)[0][0] for pair in pairs]
    assert [score for score, _ in log_likelihoods(ours, pairs, max_length=64, batch_size=3)] == pytest.approx(
        scores, abs=1e-4
    )


def test_wrong_prompts_are_named():
    model = tiny("gpt2")
    with pytest.raises(ConfigError, match="empty prompt; where=prompt 1"):
        generate(model, [[1], []], SamplingParams(1))
    with pytest.raises(ConfigError, match="token outside the vocabulary; where=prompt 0; got=97; want=0 <= id < 97"):
        generate(model, [[1, 97]], SamplingParams(1))
    with pytest.raises(
        ConfigError,
        match="more tokens than the model has positions; where=prompt 0; got=60 of the prompt [+] 5 new; want=at most "
        "64",
    ):
        generate(model, [[1] * 60], SamplingParams(5))
    assert generate(model, [], SamplingParams(1)) == []


@pytest.mark.parametrize("name", ["neox", "gpt2", "llama"])
def test_load_model_gives_the_saved_model(tmp_path, name):
    model = tiny(name)
    path = save_model(tmp_path / "run", model)
    tokens = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        expected = model(tokens)
        for place in (tmp_path / "run", tmp_path / "run" / "checkpoints", path):
            loaded = load_model(place)
            assert not loaded.training
            assert torch.equal(loaded(tokens), expected)
    assert dump(Config(model=model.config)) == Checkpoint(path).config_lock


def test_a_checkpoint_of_kernels_that_only_the_training_had_gives_the_same_logits(tmp_path):
    """The kernels for Hopper need a GPU and 16 bits; --device and --dtype of a command decide for themselves."""
    model = tiny("neox")
    trained = json.loads(model.config.model_dump_json()) | {"attention_backend": "hopper"}
    path = save_model(tmp_path / "run", model, model_config=trained)
    tokens = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        loaded = load_model(path)
        assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.config.attention_backend == "auto"


def test_load_model_names_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        load_model(tmp_path / "nothing")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        load_model(tmp_path / "run")
    path = save_model(tmp_path / "other", tiny("neox"), model_config=json.loads(tiny("llama").config.model_dump_json()))
    with pytest.raises(CheckpointError, match="no such parameter"):
        load_model(path)


@pytest.fixture
def scripted(monkeypatch):
    """Tokens that are "sampled" in place of those of the model, one list per step; notes how often it is asked."""

    def play(*steps: list[int]) -> list:
        left, asked = list(steps), []

        def choose(logits, params, generators):
            asked.append((tuple(logits.shape), [generator.initial_seed() for generator in generators]))
            return torch.tensor(left.pop(0))

        monkeypatch.setattr("neox.generate.generate.choose", choose)
        return asked

    return play


def test_each_prompt_ends_by_itself_and_all_together_end_the_loop(scripted):
    """Also by the id 0, and at the first token; nothing is added or reported after the end of a prompt."""
    model, told, checked = tiny("neox"), [], []
    asked = scripted([0, 7, 5], [8, 8, 5], [9, 0, 5], [1, 1, 6], [1, 1, 1])

    def is_done(row, tokens):
        checked.append((row, list(tokens)))
        return tokens[-1] == 6

    found = generate(
        model, PROMPTS, SamplingParams(9), eod_id=0, on_token=lambda *each: told.append(each), is_done=is_done
    )
    assert found == [[], [7, 8], [5, 5, 5, 6]] and len(asked) == 4
    assert told == [(1, 7), (2, 5), (1, 8), (2, 5), (2, 5), (2, 6)]
    assert checked == [(1, [7]), (2, [5]), (1, [7, 8]), (2, [5, 5]), (2, [5, 5, 5]), (2, [5, 5, 5, 6])]


@pytest.mark.parametrize(("eod", "wanted"), [(None, [0, 1, 2]), ((), [0, 1, 2]), ([2, 1], [0]), ({0}, []), (1, [0])])
def test_what_ends_a_text(scripted, eod, wanted):
    scripted([0], [1], [2])
    assert generate(tiny("neox"), [[5]], SamplingParams(3), eod_id=eod) == [wanted]


def test_streams_are_numbered_from_zero_unless_they_are_given(scripted):
    asked = scripted([1, 1], [1, 1])
    generate(tiny("neox"), PROMPTS[:2], SamplingParams(1, seed=9))
    generate(tiny("neox"), PROMPTS[:2], SamplingParams(1, seed=9), streams=[4, 2])
    wanted = [[prompt_generator(9, stream).initial_seed() for stream in streams] for streams in ((0, 1), (4, 2))]
    assert [seeds for _, seeds in asked] == wanted and asked[0][0] == (2, 97)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(training):
    model, seen = tiny("neox").train(training), []

    def interrupt(row, token):
        seen.append((model.training, torch.is_inference_mode_enabled()))
        if len(seen) == 3:
            raise KeyboardInterrupt

    generate(model, [[1]], SamplingParams(2), on_token=interrupt)
    assert model.training == training
    with pytest.raises(KeyboardInterrupt):
        generate(model, [[1]], SamplingParams(2), on_token=interrupt)
    assert model.training == training and seen == [(False, True)] * 3 and not torch.is_inference_mode_enabled()


def test_only_positions_that_end_limit_a_text():
    """Alibi has none; a rotary model reads exactly as many tokens as it has."""
    params = SamplingParams(4, 0)
    assert len(generate(tiny("alibi"), [[1] * 63], params)[0]) == 4
    for length, fits in ((60, True), (61, False)):
        if fits:
            check_prompts(tiny("neox").config, [[1], [1] * length], params)
        else:
            with pytest.raises(ConfigError, match=f"where=prompt 1; got={length} of the prompt . 4 new"):
                check_prompts(tiny("neox").config, [[1], [1] * length], params)
    with pytest.raises(ConfigError, match="where=prompt 1; got=-1; want=0 <= id < 97"):
        check_prompts(tiny("neox").config, [[0, 96], [3, -1, 98]], params)


def test_a_reward_model_generates_nothing():
    config = tiny("neox").config.model_copy(update={"output": "score"})
    with pytest.raises(ConfigError, match="a reward model generates no text; where=model.output; got=score"):
        check_prompts(config, [[1]], SamplingParams(1))


def test_weights_have_the_dtype_and_the_kernels_that_are_asked_for(tmp_path):
    model = tiny("neox")
    path = save_model(tmp_path / "run", model)
    loaded = load_model(path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    weights = dict(loaded.logical_weights())
    assert all(torch.equal(weights[name], weight.bfloat16()) for name, weight in model.logical_weights())
    assert {weight.dtype for weight in load_model(path).parameters()} == {torch.float32}
    mesh = Mesh.single("cpu")
    on_mesh = load_model(path, device="meta", mesh=mesh)
    assert on_mesh.mesh.world_size == 1 and next(on_mesh.parameters()).device == mesh.device


@pytest.mark.parametrize("given", [True, False])
def test_the_kernels_are_those_of_the_device_and_dtype(tmp_path, monkeypatch, given):
    path, asked = save_model(tmp_path / "run", tiny("neox")), []

    def supported(config, dtype, device):
        asked.append((config.vocab_size, dtype, device))
        return config

    monkeypatch.setattr("neox.generate.generate.with_supported_attention", supported)
    options = {"mesh": Mesh.single("cpu"), "device": "meta"} if given else {"device": "cpu"}
    model = load_model(path, dtype=torch.bfloat16, **options)
    assert asked == [(97, torch.bfloat16, "cpu")] and next(model.parameters()).device.type == "cpu"
