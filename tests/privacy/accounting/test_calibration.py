"""Calibration against the filter that enforces: a plan fits, and hardly anything less would."""

from __future__ import annotations

import dataclasses

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from conclave.base.errors import BadInputError
from conclave.privacy.accounting.calibration import PlannedChoices, PlannedRelease, calibrate_noise, calibrate_plan
from conclave.privacy.accounting.filter import budget_units, epsilon_of, fixed_order
from conclave.privacy.accounting.mechanisms import ExponentialChoice, SampledGaussian, joint_noise
from conclave.privacy.accounting.prices import charge_units

DELTA = 1e-5

TRAINING = PlannedRelease(
    sampling_rate=0.05,
    steps=4,
    charges=30,
    share=0.85,
    parts=(("gradients", 0.97), ("expert-load", 0.02), ("clip-quantile", 0.01)),
)
METRICS = PlannedRelease(sampling_rate=0.2, steps=1, charges=30, share=0.1, parts=(("metrics", 1.0),))
COUNTS = PlannedRelease(sampling_rate=1.0, steps=1, charges=2, share=0.05, parts=(("sizes", 0.5), ("labels", 0.5)))
PLAN = (COUNTS, TRAINING, METRICS)
CHOICES = (PlannedChoices(mechanism=ExponentialChoice(epsilon=0.1, choices=5), charges=3),)


def charge(q, sigma, steps):
    return SampledGaussian(sampling_rate=q, noise_multiplier=sigma, steps=steps)


def spent(releases, noises, choices, order):
    """What a ledger will have charged, one charge at a time."""
    total = sum(charge_units(planned.mechanism, order) for planned in choices for _ in range(planned.charges))
    for release, noise in zip(releases, noises, strict=True):
        for _ in range(release.charges):
            total += charge_units(charge(release.sampling_rate, noise, release.steps), order)
    return total


@pytest.mark.parametrize(
    ("epsilon", "q", "steps", "charges"), [(8.0, 0.5, 1, 30), (3.0, 0.1, 4, 30), (1.0, 0.01, 10, 100)]
)
def test_calibrated_noise_just_passes_the_filter_that_enforces(epsilon, q, steps, charges):
    sigma = calibrate_noise(epsilon=epsilon, delta=DELTA, sampling_rate=q, steps_per_charge=steps, charges=charges)
    order = fixed_order(epsilon, DELTA)
    budget = budget_units(epsilon, DELTA, order)
    assert charges * charge_units(charge(q, sigma, steps), order) <= budget
    assert charges * charge_units(charge(q, sigma * (1 - 1e-5), steps), order) > budget


# Values of the release before plans could have several parts: seeded runs depend on every bit.
@pytest.mark.parametrize(
    ("epsilon", "q", "steps", "charges", "bits"),
    [
        (8.0, 0.5, 1, 30, "0x1.f5564b662fdfcp+0"),
        (3.0, 0.1, 4, 30, "0x1.eb6bc1eff9f88p+0"),
        (1.0, 0.01, 10, 100, "0x1.857214f0520d1p+0"),
        (8.0, 1.0, 1, 1, "0x1.4b42aa9f7b5afp-1"),
        (200.0, 0.3, 2, 1, "0x1.61a500d5e8d54p-4"),
    ],
)
def test_calibrated_noise_has_not_moved_by_one_bit(epsilon, q, steps, charges, bits):
    sigma = calibrate_noise(epsilon=epsilon, delta=DELTA, sampling_rate=q, steps_per_charge=steps, charges=charges)
    assert sigma.hex() == bits


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
@pytest.mark.parametrize("choices", [(), CHOICES])
@pytest.mark.parametrize("releases", [PLAN, PLAN[::-1]])
def test_a_plan_of_many_releases_just_passes_the_filter(epsilon, choices, releases):
    calibrated = calibrate_plan(epsilon=epsilon, delta=DELTA, releases=releases, choices=choices)
    order = fixed_order(epsilon, DELTA)
    budget = budget_units(epsilon, DELTA, order)
    noises = [one.noise_multiplier for one in calibrated]
    assert 0.999 * budget <= spent(releases, noises, choices, order) <= budget
    for number in range(len(noises)):
        less = [noise * (1 - 1e-5 * (n == number)) for n, noise in enumerate(noises)]
        assert spent(releases, less, choices, order) > budget


def test_each_release_spends_its_share_of_what_the_choices_leave():
    epsilon = 3.0
    order = fixed_order(epsilon, DELTA)
    calibrated = calibrate_plan(epsilon=epsilon, delta=DELTA, releases=PLAN, choices=CHOICES)
    left = budget_units(epsilon, DELTA, order) - spent((), (), CHOICES, order)
    for release, one in zip(PLAN, calibrated, strict=True):
        used = spent([release], [one.noise_multiplier], (), order)
        assert used == pytest.approx(release.share * left, rel=1e-4)


def test_shares_below_one_leave_the_rest_unspent():
    half = dataclasses.replace(METRICS, share=0.5)
    (one,) = calibrate_plan(epsilon=8.0, delta=DELTA, releases=[half])
    order = fixed_order(8.0, DELTA)
    assert spent([half], [one.noise_multiplier], (), order) == pytest.approx(
        budget_units(8.0, DELTA, order) / 2, rel=1e-4
    )


def test_the_parts_are_together_what_is_charged():
    calibrated = calibrate_plan(epsilon=8.0, delta=DELTA, releases=PLAN)
    for release, one in zip(PLAN, calibrated, strict=True):
        noises = dict(one.parts)
        assert noises.keys() == dict(release.parts).keys()
        assert one.noise_multiplier == joint_noise(noises.values())
        for name, precision in release.parts:
            assert (one.noise_multiplier / noises[name]) ** 2 == pytest.approx(precision, rel=1e-9)


def test_one_part_with_all_the_precision_is_the_plain_case():
    release = PlannedRelease(sampling_rate=0.1, steps=4, charges=30)
    (one,) = calibrate_plan(epsilon=3.0, delta=DELTA, releases=[release])
    sigma = calibrate_noise(epsilon=3.0, delta=DELTA, sampling_rate=0.1, steps_per_charge=4, charges=30)
    assert (one.noise_multiplier, one.parts) == (sigma, (("gradients", sigma),))


def test_dp_accounting_alone_agrees_that_the_plan_fits():
    epsilon = 8.0
    calibrated = calibrate_plan(epsilon=epsilon, delta=DELTA, releases=PLAN)
    accountant = RdpAccountant(orders=[fixed_order(epsilon, DELTA)])
    for release, one in zip(PLAN, calibrated, strict=True):
        event = PoissonSampledDpEvent(release.sampling_rate, GaussianDpEvent(one.noise_multiplier))
        accountant.compose(event, release.steps * release.charges)
    assert 7.99 < accountant.get_epsilon(DELTA) <= 8.0


def test_pld_calibration_would_be_refused():
    """The trap: σ from a PLD curve spends more than the budget when it is enforced with RDP."""

    def by_pld(sigma: float) -> float:
        accountant = PLDAccountant(value_discretization_interval=1e-3)
        accountant.compose(PoissonSampledDpEvent(0.05, GaussianDpEvent(sigma)), 200)
        return accountant.get_epsilon(DELTA)

    low, high = 0.5, 1.0
    assert by_pld(low) > 8 >= by_pld(high)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if by_pld(middle) <= 8 else (middle, high)
    order = fixed_order(8.0, DELTA)
    spent = charge_units(charge(0.05, high, 200), order)
    assert spent > budget_units(8.0, DELTA, order)
    assert epsilon_of(spent, order, DELTA) > 8.5


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"share": 0.0}, "share is 0.0, must be above 0 and at most 1"),
        ({"share": 1.5}, "share is 1.5, must be above 0 and at most 1"),
        ({"charges": 0}, "charges is 0, must be at least 1"),
        ({"steps": 0}, "steps is 0, must be at least 1"),
        ({"sampling_rate": 0.0}, "sampling_rate is 0.0, must be above 0 and at most 1"),
        ({"parts": (("a", 0.5), ("b", 0.4))}, "the precisions of the parts sum to 0.9, must sum to 1"),
        ({"parts": ()}, "the precisions of the parts sum to 0.0, must sum to 1"),
        ({"parts": (("a", 1.0), ("b", 0.0))}, "the precision of part b is 0.0, must be above 0 and at most 1"),
        ({"parts": (("a", 0.5), ("a", 0.5))}, "two parts have one name, must have names of their own"),
    ],
)
def test_a_release_that_makes_no_sense_is_refused(values, sentence):
    with pytest.raises(BadInputError) as caught:
        dataclasses.replace(TRAINING, **values)
    assert str(caught.value) == sentence


def test_impossible_plans_are_refused_in_one_sentence():
    with pytest.raises(BadInputError, match="fewer rounds or a larger epsilon"):
        calibrate_noise(epsilon=0.05, delta=1e-9, sampling_rate=1.0, steps_per_charge=10**6, charges=10**6)
    small = dataclasses.replace(COUNTS, share=1e-9, charges=10**5)
    with pytest.raises(BadInputError, match=r"within a share of 1e-09 of epsilon 0\.3 .*fewer rounds"):
        calibrate_plan(epsilon=0.3, delta=DELTA, releases=[small])
    with pytest.raises(BadInputError, match=r"shares of the releases sum to 1\.1, must sum to at most 1"):
        calibrate_plan(epsilon=8.0, delta=DELTA, releases=[*PLAN, METRICS])
    dear = PlannedChoices(mechanism=ExponentialChoice(epsilon=5.0, choices=2), charges=1)
    with pytest.raises(
        BadInputError, match=r"choices alone cost epsilon 1\d\..* must leave room in a budget of epsilon 8"
    ):
        calibrate_plan(epsilon=8.0, delta=DELTA, releases=PLAN, choices=[dear])
    with pytest.raises(BadInputError, match="charges is 0, must be at least 1"):
        dataclasses.replace(dear, charges=0)
    with pytest.raises(BadInputError, match="must be larger to allow any release"):
        calibrate_plan(epsilon=1e-6, delta=1e-12, releases=PLAN)


def test_choices_alone_may_use_the_whole_budget():
    assert calibrate_plan(epsilon=8.0, delta=DELTA, releases=(), choices=CHOICES) == ()
