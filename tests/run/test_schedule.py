"""Learning rates over a run, and runs that end in time."""

import itertools
from typing import Any

import pytest

from smelter.config import DistillationConfig, TrainingConfig
from smelter.run.schedule import RunLength, final_cap, kl_weight, lr_factor, muon_momentum, set_rates


def test_warmup_stable_decay() -> None:
    config = TrainingConfig(warmup_steps=10, cooldown_fraction=0.2, min_lr_ratio=0.1)
    factors = [lr_factor("wsd", step, 100, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:81] == [1.0] * 72
    assert factors[90] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert lr_factor("wsd", 95, None, config) == 1.0  # the end is not known yet


def test_cosine_and_constant() -> None:
    config = TrainingConfig(warmup_steps=10, min_lr_ratio=0.0)
    assert lr_factor("cosine", 10, 110, config) == pytest.approx(1.0)
    assert lr_factor("cosine", 60, 110, config) == pytest.approx(0.5)
    assert lr_factor("cosine", 110, 110, config) == pytest.approx(0.0)
    assert [lr_factor("constant", step, 110, config) for step in (4, 50, 109)] == [0.5, 1.0, 1.0]


def test_momentum_rises_and_decay_falls() -> None:
    config = TrainingConfig(muon_momentum_warmup=100, muon_weight_decay=0.2)
    assert [muon_momentum(step, config) for step in (0, 50, 100, 900)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    groups: list[dict[str, Any]] = [{"name": "muon"}, {"name": "embedding"}, {"name": "vectors"}]
    set_rates(groups, 500, 1_000, config)
    assert groups[0]["weight_decay"] == pytest.approx(0.1)
    assert [group["lr"] for group in groups] == [config.muon_lr, config.embedding_lr, config.adamw_lr]


def simulate(seconds_of_step: dict[int, float], config: TrainingConfig) -> tuple[int, float, list[float]]:
    """Steps, seconds and rates of a run whose steps take the given time from the given step on."""
    length, step, elapsed, seconds = RunLength.of(config), 0, 0.0, 0.0
    rates = []
    while not length.done(step):
        rates.append(lr_factor("wsd", step, length.num_steps, config))
        seconds = seconds_of_step.get(step, seconds)
        elapsed += seconds
        step += 1
        length.update(step, elapsed, seconds)
    return step, elapsed, rates


def test_a_run_limited_by_time_ends_in_time() -> None:
    config = TrainingConfig(train_minutes=1.0, cooldown_fraction=0.4, warmup_steps=0)
    steps, elapsed, rates = simulate({0: 0.1}, config)
    assert elapsed == pytest.approx(60, abs=0.2)
    assert steps == pytest.approx(600, abs=2)
    assert rates[358] == 1.0
    assert rates[480] == pytest.approx(0.5, abs=0.01)
    assert rates[-1] < 0.01


def test_a_machine_that_turns_slow_in_the_cooldown_still_ends_in_time() -> None:
    config = TrainingConfig(train_minutes=1.0, cooldown_fraction=0.4, warmup_steps=0)
    steps, elapsed, rates = simulate({0: 0.1, 450: 0.3}, config)
    assert elapsed == pytest.approx(60, abs=0.5)
    assert steps == pytest.approx(500, abs=2)
    assert rates[-1] < 0.02
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))


def test_a_given_number_of_steps_stays() -> None:
    length = RunLength.of(TrainingConfig(num_steps=7))
    length.update(3, 1e9, 1.0)
    assert length.num_steps == 7
    assert not length.done(6)
    assert length.done(7)


def test_the_inverse_of_the_final_cap_falls_to_nothing_at_the_last_step() -> None:
    caps = [final_cap(30.0, step, 100, 0.2) for step in range(101)]
    assert caps[:80] == [30.0] * 80
    assert [1 / cap for cap in caps[80:99]] == pytest.approx([(99 - step) / 20 / 30 for step in range(80, 99)])
    assert caps[99:] == [0.0, 0.0]
    assert final_cap(30.0, 99, None, 0.2) == 30.0  # the end is not known yet
    assert final_cap(30.0, 99, 100, 0.0) == 30.0
    assert final_cap(0.0, 50, 100, 1.0) == 0.0
    assert final_cap(30.0, 0, 1, 1.0) == 0.0


def test_a_run_limited_by_time_knows_its_end_when_the_cap_must_go() -> None:
    config = TrainingConfig(train_minutes=1.0, cooldown_fraction=0.1, final_cap_anneal_fraction=0.5)
    length = RunLength.of(config)
    length.update(200, 20.0, 0.1)
    assert length.num_steps is None
    length.update(300, 30.0, 0.1)
    assert length.num_steps == 600


def test_the_share_of_the_teachers_over_a_run() -> None:
    constant = DistillationConfig(kl_weight=0.8, kl_weight_end=0.2)
    linear = DistillationConfig(kl_weight=0.8, kl_weight_end=0.2, kl_schedule="linear")
    assert [kl_weight(x, constant) for x in (0, 0.5, 1)] == [0.8] * 3
    assert [kl_weight(x, linear) for x in (0, 0.5, 1)] == pytest.approx([0.8, 0.5, 0.2])


def test_progress_is_by_steps_or_by_the_clock() -> None:
    by_steps = RunLength.of(TrainingConfig(num_steps=200))
    assert [by_steps.progress(step, 1e9) for step in (0, 50, 200)] == [0, 0.25, 1]
    by_clock = RunLength.of(TrainingConfig(train_minutes=2.0))
    assert [by_clock.progress(10**6, elapsed) for elapsed in (0, 30, 120, 999)] == [0, 0.25, 1, 1]
