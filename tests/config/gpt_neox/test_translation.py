"""The state of a translation: sources of values, and precedence of native settings."""

from __future__ import annotations

from neox.config.gpt_neox.translation import DEFAULT, Given, Translation


def translation(native: dict | None = None, **values) -> Translation:
    return Translation(
        {name: Given(value, "a.yml", line) for line, (name, value) in enumerate(values.items(), 1)}, native or {}
    )


def test_a_value_is_from_the_file_or_the_default_or_native():
    work = translation({("model", "num_layers"): 7}, num_layers=2, warmup=None)
    assert (work.value("num_layers"), work.value("warmup"), work.value("rotary_pct")) == (7, 0.01, 1.0)


def test_settings_have_a_line():
    work = translation(hidden_size=8, norm="rmsnorm")
    work.set("model.norm", "rmsnorm", "norm")
    work.set("model.init", "normal", "init_method")
    assert [(item.path, item.source, item.line) for item in work.settings] == [
        (("model", "norm"), "a.yml", 2),
        (("model", "init"), DEFAULT, 0),
    ]


def test_a_native_value_suppresses_a_problem():
    work = translation({("model", "init"): "normal"}, init_method="orthogonal")
    work.refuse("init_method", "no", decides="model.init")
    assert work.problems == []
    work.refuse("init_method", "no")
    assert work.problems[0].where == "a.yml:1 init_method" and work.problems[0].got == "'orthogonal'"


def test_harmless_values_of_unsupported_keys_pass():
    work = translation(use_mup=False, moe_num_experts=1, amp={"enabled": False}, elasticity={})
    work.unknown_and_unsupported()
    assert work.problems == []
    work = translation(use_mup=True, moe_num_experts=True)
    work.unknown_and_unsupported()
    assert len(work.problems) == 2


def test_numbers_are_checked():
    work = translation(warmup="0.1", lr_decay_iters=True, min_lr=1)
    assert (work.number("warmup"), work.number("lr_decay_iters"), work.number("min_lr")) == (None, None, 1)
    assert len(work.problems) == 2
