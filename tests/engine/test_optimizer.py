"""Optimizers: groups, decay, and updates against the formulas written out."""

import pytest
import torch

from neox.config.schema import OptimizerConfig
from neox.engine.footprint import is_hidden_matrix, optimizer_state_keys
from neox.engine.optimizer import build_optimizer, counter, groups

NAMES = {
    "embedding.word.weight": (16, 8),
    "layers.0.norm1.weight": (8,),
    "layers.0.norm1.bias": (8,),
    "layers.0.attention.qkv.weight": (24, 8),
    "layers.0.attention.qkv.bias": (24,),
    "norm.weight": (8,),
    "head.weight": (16, 8),
}


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in NAMES.items()
    }


def config(kind, **keys):
    return OptimizerConfig(type=kind, lr=0.1, weight_decay=0.25, betas=(0.8, 0.9), momentum=0.7, **keys)


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd", "muon"])
def test_only_matrices_decay(kind):
    named = parameters()
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = build_optimizer(named.items(), config(kind))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in named.items()} == {
        name: 0.25 if len(shape) > 1 else 0.0 for name, shape in NAMES.items()
    }
    if kind == "muon":  # needs real gradients for its matrices
        return
    for p in named.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in named.items():
        torch.testing.assert_close(
            p.detach(), before[name] * (1 - 0.1 * 0.25) if p.ndim > 1 else before[name], rtol=1e-6, atol=0
        )


def steps(kind, count=3, **keys):
    named = parameters()
    name = "layers.0.attention.qkv.weight"
    p = named[name]
    grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    before = p.detach().double().clone()
    optimizer = build_optimizer([(name, p)], config(kind, **keys))
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return before, [g.double() for g in grads], p.detach().double(), optimizer.state[p]


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_adamw_follows_the_paper(eps):
    p, grads, got, state = steps("adamw", eps=eps)
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = 0.8 * m + 0.2 * g
        v = 0.9 * v + 0.1 * g * g
        p = p * (1 - 0.1 * 0.25) - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + eps)
    torch.testing.assert_close(got, p, rtol=1e-5, atol=1e-6)
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}


def test_lion_follows_the_paper():
    p, grads, got, state = steps("lion")
    m = torch.zeros_like(p)
    for g in grads:
        p = p - 0.1 * (torch.sign(0.8 * m + 0.2 * g) + 0.25 * p)
        m = 0.9 * m + 0.1 * g
    torch.testing.assert_close(got, p, rtol=1e-5, atol=1e-6)
    assert set(state) == {"exp_avg"}


def test_sgd_has_heavy_ball_momentum():
    p, grads, got, state = steps("sgd")
    m = torch.zeros_like(p)
    for g in grads:
        m = 0.7 * m + g
        p = p * (1 - 0.1 * 0.25) - 0.1 * m
    torch.testing.assert_close(got, p, rtol=1e-5, atol=1e-6)
    assert set(state) == {"momentum_buffer"}


def test_adamw_is_the_fused_one():
    assert build_optimizer(parameters().items(), config("adamw")).defaults["fused"] is True


def test_muon_takes_hidden_matrices_only():
    named = parameters()
    first, *rest = groups(named.items(), config("muon"))
    assert first["use_muon"]
    assert [id(p) for p in first["params"]] == [id(named["layers.0.attention.qkv.weight"])]
    assert not any(group["use_muon"] for group in rest)
    assert not is_hidden_matrix("embedding.word.weight", 2)


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd", "muon"])
def test_row_parallel_biases_have_a_learning_rate_of_their_own(kind):
    shapes = {
        "attention.out.weight": (8, 8),
        "attention.out.bias": (8,),
        "attention.qkv.bias": (24,),
        "mlp.down.bias": (8,),
        "mlp.up.bias": (8,),
    }
    named = {f"layers.1.{name}": torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    scaled = [
        group
        for group in build_optimizer(named.items(), config(kind, row_bias_lr_multiplier=4)).param_groups
        if group.get("lr_scale", 1) != 1
    ]
    names = {id(p): name.removeprefix("layers.1.") for name, p in named.items()}
    assert [
        (group["lr_scale"], group["weight_decay"], [names[id(p)] for p in group["params"]]) for group in scaled
    ] == [(4, 0.0, ["attention.out.bias", "mlp.down.bias"])]
    assert all("lr_scale" not in group for group in build_optimizer(named.items(), config(kind)).param_groups)


def test_frozen_parameters_and_empty_groups_are_left_out():
    named = parameters()
    named["head.weight"].requires_grad_(False)
    assert sum(len(group["params"]) for group in groups(named.items(), config("adamw"))) == len(NAMES) - 1
    assert len(groups([("norm.weight", named["norm.weight"])], config("adamw"))) == 1


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd", "muon"])
def test_the_state_keys_are_those_of_a_step(kind):
    named = parameters()
    optimizer = build_optimizer(named.items(), config(kind))
    want = {name: optimizer_state_keys(config(kind), name, p.ndim) for name, p in named.items()}
    with torch.compiler.set_stance("force_eager"):
        for _ in range(3):
            for p in named.values():
                p.grad = torch.ones_like(p)
            optimizer.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = next(name for name, other in named.items() if other is p)
            extra = counter(optimizer, group, torch.device("cpu"), 3)
            assert set(want[name]) | set(extra) == set(optimizer.state[p])
            assert all(float(optimizer.state[p][key]) == float(value) for key, value in extra.items())


def test_adamw_is_torchs_to_the_bit():
    ours, theirs = parameters(), parameters()
    one = build_optimizer(ours.items(), config("adamw", eps=1e-6))
    theirs_groups = groups(theirs.items(), config("adamw", eps=1e-6))
    two = torch.optim.AdamW(theirs_groups, lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.25, fused=True)
    for step in range(4):
        for a, b in zip(ours.values(), theirs.values(), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        one.step()
        two.step()
    for a, b in zip(ours.values(), theirs.values(), strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(one.state[a][key], two.state[b][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_a_parameter_without_a_gradient_stays_as_it_is(kind):
    """Neither decay nor momentum moves it; a group without any gradient is passed over."""
    named = parameters()
    optimizer = build_optimizer(named.items(), config(kind))
    moved = named["layers.0.attention.qkv.weight"]
    for step in range(2):
        for p in named.values():
            p.grad = torch.ones_like(p) if step == 0 or p is moved else None
        before = {name: p.detach().clone() for name, p in named.items()}
        state = {name: {key: v.clone() for key, v in optimizer.state[p].items()} for name, p in named.items()}
        optimizer.step()
    for name, p in named.items():
        same = torch.equal(p, before[name]) and all(
            torch.equal(value, state[name][key]) for key, value in optimizer.state[p].items()
        )
        assert same == (p is not moved), name


def test_adamw_takes_parameters_of_several_dtypes():
    named = parameters()
    half = torch.nn.Parameter(named["norm.weight"].detach().bfloat16())
    named["layers.0.norm1.bias"] = half
    optimizer = build_optimizer(named.items(), config("adamw"))
    alone = torch.nn.Parameter(half.detach().clone())
    reference = build_optimizer([("norm.weight", alone)], config("adamw"))
    for step in range(2):
        for p in named.values():
            p.grad = torch.full_like(p, 0.5 - step)
        alone.grad = half.grad.clone()
        optimizer.step(), reference.step()
    assert half.dtype == torch.bfloat16 and torch.equal(half, alone)
    assert all(float(optimizer.state[p]["step"]) == 2.0 for p in named.values())


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_each_group_has_its_own_rate_and_its_own_settings(kind):
    """As the engine sets them: lr per group, at every step."""
    named = parameters()
    optimizer = build_optimizer(named.items(), config(kind))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[1]["lr"] = 0.5
    before = {name: p.detach().clone() for name, p in named.items()}
    for p in named.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in named.items():
        # the first step of each is the rate, of a gradient of one
        torch.testing.assert_close(p.detach(), before[name] - (0.5 if p.ndim == 1 else 0.0), rtol=1e-6, atol=1e-6)


def test_muon_gets_its_settings_and_adamw_the_others():
    named = parameters()
    optimizer = build_optimizer(named.items(), config("muon", eps=1e-5))
    first, *rest = optimizer.param_groups
    assert {key: first[key] for key in ("lr", "momentum", "weight_decay", "use_muon")} == {
        "lr": 0.1,
        "momentum": 0.7,
        "weight_decay": 0.25,
        "use_muon": True,
    }
    assert [group["weight_decay"] for group in rest] == [0.25, 0.0]
    for group in rest:
        assert (group["lr"], tuple(group["betas"]), group["eps"], group["use_muon"]) == (0.1, (0.8, 0.9), 1e-5, False)
    assert {name for name, p in named.items() if p.use_muon} == {"layers.0.attention.qkv.weight"}


def test_settings_of_the_config_reach_every_optimizer():
    names = list(parameters().items())
    adamw, lion, sgd = (
        build_optimizer(names, config(kind, eps=1e-5)).param_groups for kind in ("adamw", "lion", "sgd")
    )
    assert {(group["lr"], group["betas"], group["eps"]) for group in adamw} == {(0.1, (0.8, 0.9), 1e-5)}
    assert {(group["lr"], group["betas"]) for group in lion} == {(0.1, (0.8, 0.9))}
    assert {(group["lr"], group["momentum"]) for group in sgd} == {(0.1, 0.7)}
    assert all("use_muon" not in group for group in (*adamw, *lion, *sgd))


def test_groups_are_in_their_order_and_hold_each_parameter_once():
    named = parameters() | {"layers.0.mlp.down.bias": torch.nn.Parameter(torch.zeros(8))}
    names = {id(p): name for name, p in named.items()}
    got = [
        [names[id(p)] for p in group["params"]]
        for group in groups(named.items(), config("muon", row_bias_lr_multiplier=2))
    ]
    assert got == [
        ["layers.0.attention.qkv.weight"],
        ["embedding.word.weight", "head.weight"],
        ["layers.0.norm1.weight", "layers.0.norm1.bias", "layers.0.attention.qkv.bias", "norm.weight"],
        ["layers.0.mlp.down.bias"],
    ]
    scaled = groups(named.items(), config("adamw", row_bias_lr_multiplier=2))[-1]
    assert scaled["lr_scale"] == 2
    assert len(groups(named.items(), config("adamw", row_bias_lr_multiplier=1))) == 2
