"""A checkpoint of any layout loads into any other: saved again it is bitwise equal, the next loss up to rounding."""

import itertools

import pytest

from neox.checkpoint.verify import digest
from tests.faults.runs import Setting, arguments, newest
from tests.train.corpus import records

pytestmark = pytest.mark.distributed

LAYOUTS = ("1x1x1", "2x1x1", "1x2x1", "1x1x2", "2x2x1", "1x2x2", "4x1x1")  # dp x tp x pp
STEPS = 3
QUICK = [("1x1x2", "2x2x1"), ("1x2x2", "2x1x1")]


def setting(layout: str, stage: int, *more: str) -> Setting:
    dp, tp, pp = (int(part) for part in layout.split("x"))
    sizes = (
        f"parallel.tensor={tp}",
        f"parallel.pipeline={pp}",
        f"zero.stage={stage}",
        "train.gradient_accumulation=null",
        "schedule.decay_iters=20",
    )
    return Setting(dp * tp * pp, ("checkpoint.save_interval=0", "evaluate.interval=0", *sizes, *more))


def stage_of(layout: str, number: int) -> int:
    """One of the stages that the layout allows; `number` turns through them."""
    return number % (2 if layout.endswith("2") else 4)


def train(server, corpus, run, layout: str, stage: int, *more: str):
    training = server.start(
        arguments(corpus, run, setting(layout, stage, *more)), run.parent, ranks=setting(layout, stage).ranks
    )
    codes = training.wait(120)
    assert set(codes) == {0}, f"{layout} stage {stage} {more}: {codes}\n{training.outputs()}"


@pytest.fixture(scope="module")
def sources(server, corpus, tmp_path_factory):
    """layout, stage -> the checkpoint of three steps trained in it; trained once, when it is asked for."""
    made = {}
    folder = tmp_path_factory.mktemp("sources")

    def source(layout: str, stage: int):
        if (layout, stage) not in made:
            run = folder / f"{layout}-{stage}"
            train(server, corpus, run, layout, stage, f"train.train_iters={STEPS}")
            made[layout, stage] = newest(run)
        return made[layout, stage]

    return source


def check_pair(server, corpus, folder, sources, pair: tuple[str, str], stages: tuple[int, int]) -> None:
    saved = sources(pair[0], stages[0])
    want = digest(saved)
    assert len(want) > 30
    again = folder / "again"
    train(server, corpus, again, pair[1], stages[1], f"train.train_iters={STEPS}", f"checkpoint.resume={saved}")
    assert digest(newest(again)) == want, f"{pair} {stages}"
    straight = folder / "straight"
    train(server, corpus, straight, pair[0], stages[0], f"train.train_iters={STEPS + 1}", f"checkpoint.resume={saved}")
    train(server, corpus, again, pair[1], stages[1], f"train.train_iters={STEPS + 1}", "checkpoint.resume=must")
    a, b = records(straight)[-1], records(again)[-1]
    assert a["step"] == b["step"] == STEPS + 1
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-6), f"{pair} {stages}"
    assert (a["samples"], a["lr"]) == (b["samples"], b["lr"])
    if pair[0] == pair[1] and stages[0] == stages[1]:
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])


@pytest.mark.parametrize("pair", QUICK, ids="-".join)
def test_a_pair_of_layouts(server, corpus, tmp_path, sources, pair):
    check_pair(server, corpus, tmp_path, sources, pair, (1, 1))


@pytest.mark.faults
@pytest.mark.parametrize(("number", "pair"), list(enumerate(itertools.product(LAYOUTS, LAYOUTS))))
def test_every_pair_of_layouts(server, corpus, tmp_path, sources, number, pair):
    check_pair(server, corpus, tmp_path, sources, pair, (1, stage_of(pair[1], number)))


@pytest.mark.faults
@pytest.mark.parametrize("stages", list(itertools.product(range(4), range(4))))
def test_every_pair_of_zero_stages(server, corpus, tmp_path, sources, stages):
    check_pair(server, corpus, tmp_path, sources, ("2x1x1", "2x1x1"), stages)
