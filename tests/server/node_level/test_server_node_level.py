"""The node as the unit: sensitivity by brute force, noise everywhere, nothing that depends on who is there."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace

import dp_accounting as dpa
import pytest
import torch
from dp_accounting import rdp
from lying_ledgers import Told
from scipy import stats
from server_samples import SmallFederation, ask, delta_for, make_plan, received, reply_with, train_reply

from conclave.audit.run import audit_run
from conclave.base.errors import BadInputError
from conclave.model import parameters
from conclave.privacy.accounting.filter import fixed_order
from conclave.privacy.accounting.mechanisms import SampledGaussian
from conclave.privacy.ledger import Entry, SignedHead
from conclave.privacy.ledger.reading.history import LedgerFile, write_export
from conclave.protocol.codec import encode
from conclave.protocol.messages import Refusal
from conclave.report.report import write_report
from conclave.server.aggregate.aggregation import WeightedDelta
from conclave.server.node_level.account import NodeAccount, _seeded_key
from conclave.server.node_level.config import NodePrivacyConfig
from conclave.server.node_level.mechanism import NodeLevelSum, clipped, own_experts, secret_cohort
from conclave.server.node_level.rounds import NodeLevelRounds
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find
from conclave.simulations.simulate import simulate

PLAN = make_plan()
SHAPES = parameters.shapes(PLAN.model, PLAN.model.all_experts)
CONFIG = NodePrivacyConfig(epsilon=20.0, delta=1e-5, clip=0.5, nodes=8)
NAMES = ["a", "b", "c", "d"]


def delta_of(node: str, length: float):
    """A delta of the node's own experts with a given joint norm."""
    held = own_experts(node, experts=6, count=3, layers=1, seed=1, round_number=1)
    generator = torch.Generator().manual_seed(ord(node))
    shapes = parameters.shapes(PLAN.model, held)
    delta = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    norm = math.hypot(*(float(tensor.norm()) for tensor in delta.values()))
    return {name: tensor * (length / norm) for name, tensor in delta.items()}


def summed(nodes, *, noise=0.0, secret=bytes(32), lengths=None, order=None):
    collected = NodeLevelSum(
        nodes, shapes=SHAPES, clip=0.5, noise_multiplier=noise, expected_nodes=1.0, expert_share=1.0
    )
    for node in order or nodes:
        collected.add(node, WeightedDelta(node, 1.0, delta_of(node, (lengths or {}).get(node, 3.0))))
    return collected.result(secret)


def distance(one, other):
    return math.hypot(*(float((one[name].double() - other[name].double()).norm()) for name in SHAPES))


def test_one_node_more_moves_the_sum_by_at_most_the_clip_and_can_by_nearly_all_of_it():
    moves = []
    for size in range(len(NAMES)):
        for others in itertools.combinations(NAMES, size):
            for node in set(NAMES) - set(others):
                lengths = {"a": 1e-3, "b": 3.0, "c": 1e4, "d": 0.4}
                moves.append(
                    distance(summed(sorted({*others, node}), lengths=lengths), summed(list(others), lengths=lengths))
                )
    assert max(moves) <= 0.5  # the clip, in floating point too
    assert max(moves) > 0.5 * (1 - 2.0**-9)


def test_a_node_that_sends_nothing_finite_adds_zeros():
    delta = delta_of("a", 1.0)
    first = next(iter(delta))
    for value in (math.nan, math.inf, -math.inf):
        broken = {**delta, first: torch.full_like(delta[first], value)}
        assert all(torch.count_nonzero(tensor) == 0 for tensor in clipped(broken, 0.5).values())
    assert all(torch.count_nonzero(t) == 0 for t in clipped({n: t * 0 for n, t in delta.items()}, 0.5).values())


def test_a_short_delta_keeps_its_length_but_for_the_margin():
    short = clipped(delta_of("a", 0.1), 0.5)
    assert math.hypot(*(float(t.norm()) for t in short.values())) == pytest.approx(0.1 * (1 - 2.0**-10), rel=1e-6)


def test_every_tensor_is_noised_also_when_nobody_took_part():
    """χ² over all values; false alarm 1e-6."""
    nobody = summed([], noise=2.0, secret=b"\1" * 32)
    assert nobody.keys() == SHAPES.keys()
    assert all(torch.count_nonzero(tensor) == tensor.numel() for tensor in nobody.values())
    values = torch.cat([tensor.flatten().double() for tensor in nobody.values()]) / (2.0 * 0.5)
    statistic = float(values.square().sum())
    assert stats.chi2(len(values)).ppf(5e-7) < statistic < stats.chi2(len(values)).ppf(1 - 5e-7)


def test_noise_is_of_the_round_and_of_the_tensor():
    one, other = (summed([], noise=1.0, secret=bytes([secret]) * 32) for secret in (1, 2))
    assert all(not torch.equal(one[name], other[name]) for name in SHAPES)
    flat = [tuple(tensor.flatten()[:4].tolist()) for tensor in one.values()]
    assert len(set(flat)) == len(flat)


def test_the_order_of_arrival_does_not_show():
    forward, backward = summed(NAMES, noise=1.0), summed(NAMES, noise=1.0, order=NAMES[::-1])
    assert all(torch.equal(forward[name], backward[name]) for name in SHAPES)


def test_divisors_are_public():
    collected = NodeLevelSum(
        NAMES, shapes=SHAPES, clip=0.5, noise_multiplier=0.0, expected_nodes=5.0, expert_share=0.25
    )
    collected.add("a", WeightedDelta("a", 7.0, delta_of("a", 0.1)))
    got, plain = collected.result(bytes(32)), clipped(delta_of("a", 0.1), 0.5)
    for name, tensor in plain.items():
        divisor = 5.0 * (1.0 if name.startswith("shared/") else 0.25)
        torch.testing.assert_close(got[name], (tensor / divisor).float())


def test_who_else_is_there_changes_neither_a_nodes_experts_nor_its_coin():
    nodes = [f"{number:016x}" for number in range(200)]
    secret = b"\5" * 32
    everyone = set(secret_cohort(nodes, 0.3, secret))
    assert everyone & set(nodes[50:]) == set(secret_cohort(nodes[50:], 0.3, secret))
    drawn = [own_experts(node, experts=6, count=3, layers=2, seed=1, round_number=1) for node in nodes]
    assert all(len(set(ids)) == 3 and list(ids) == sorted(ids) for held in drawn for ids in held.values())
    holders = [sum(expert in held[0] for held in drawn) for expert in range(6)]
    # Each is Binomial(200, 1/2); six of them outside with probability below 6e-7.
    assert all(stats.binom(200, 0.5).ppf(5e-8) <= count <= stats.binom(200, 0.5).isf(5e-8) for count in holders)


def test_cohorts_are_poisson():
    """Total of 100 rounds × 100 nodes at rate 0.3; false alarm 1e-6."""
    nodes = [f"{number:016x}" for number in range(100)]
    sizes = [len(secret_cohort(nodes, 0.3, bytes([number]) * 32)) for number in range(100)]
    assert stats.binom(10_000, 0.3).ppf(5e-7) <= sum(sizes) <= stats.binom(10_000, 0.3).isf(5e-7)
    assert len(set(sizes)) > 5  # never a fixed number
    assert secret_cohort(nodes, 1.0, bytes(32)) == nodes


def node_level(path, *, rounds=4, rate=0.5, config=CONFIG, noise=1.5):
    mechanism = SampledGaussian(sampling_rate=rate, noise_multiplier=noise, steps=1)
    return NodeLevelRounds(
        NodeAccount.open(path, config, seed=1),
        config=config,
        mechanism=mechanism,
        plan=PLAN,
        run_id="1",
        experts_per_node=3,
        seed=1,
    )


@pytest.fixture
def account(tmp_path):
    path = tmp_path / "node-level.db"
    NodeAccount.begin_simulated(path, CONFIG, seed=1)
    return path


def federation_with(level):
    return SmallFederation(plan=PLAN, weights="uniform", node_level=level)


def test_a_round_in_which_nobody_answers_still_moves_everything_and_is_charged(account):
    federation = federation_with(node_level(account, rate=1.0))
    before = federation.values()
    refusal = encode(Refusal(code="internal-error"))
    outcome = federation.round(1, lambda requests: [reply_with(request, refusal) for request in requests])
    assert (outcome.asked, outcome.replies.accepted) == (4, 0)
    after = federation.values()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert [entry.state for entry in federation.books.node_level._account.ledger.entries()] == ["RESERVED", "COMMITTED"]


def test_a_long_delta_is_scaled_not_dropped(account):
    federation = federation_with(node_level(account, rate=1.0))
    outcome = federation.round(1, lambda asked: [train_reply(r, delta_for(r, federation, 1e6)) for r in asked])
    assert (outcome.replies.accepted, outcome.replies.dropped) == (4, 0)
    # Four nodes of norm ≤ 0.5 and noise of σ·C = 0.75 over 4 expected nodes at least: nothing near 1e6.
    assert all(float(tensor.abs().max()) < 10.0 for tensor in federation.values().values())


def run_round(account, *, answer=True):
    """Start a server anew on the account, ask, and publish round one."""
    federation = federation_with(node_level(account))
    asked = []

    def train(requests):
        asked.extend(sorted(request.metadata.dst_node_id for request in requests))
        return [train_reply(request, delta_for(request, federation)) for request in requests]

    if answer:
        federation.round(1, train)
    else:
        train(ask(federation))
    federation.books.node_level.close()
    return asked, federation.values()


@pytest.mark.parametrize("mode", ["simulation", "deployment"])
def test_a_server_that_dies_before_it_commits_draws_the_same_cohort_and_noise(tmp_path, mode):
    path = tmp_path / "node-level.db"
    if mode == "simulation":
        NodeAccount.begin_simulated(path, CONFIG, seed=1)
    died, _ = run_round(path, answer=False)
    again, _ = run_round(path, answer=True)
    assert died == again
    third, model = run_round(path)  # committed: nobody is asked, and the very same step is published
    assert third == []
    other = tmp_path / "other.db"
    if mode == "simulation":
        NodeAccount.begin_simulated(other, CONFIG, seed=1)
        assert all(torch.equal(t, model[n]) for n, t in run_round(other)[1].items())


def test_a_real_server_that_dies_does_not_draw_anew(tmp_path):
    names = [f"{number:016x}" for number in range(128)]  # two draws agree on all coins with probability 2⁻¹²⁸
    cohorts = []
    for _ in range(2):
        level = node_level(tmp_path / "node-level.db")
        cohorts.append(level.begin(names, 1))
        level.close()
    assert cohorts[0] == cohorts[1]


def test_what_was_committed_is_published_bit_for_bit(account):
    _, first = run_round(account)
    asked, second = run_round(account)
    assert asked == []
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_round_that_was_given_up_publishes_nothing_and_stays_spent(account):
    for _ in range(2):
        run_round(account, answer=False)
    level = node_level(account)
    assert level.begin(["0" * 16], 1) == {}
    assert level.publish(level.collect([])) == {}
    assert level._account.ledger.epsilon_spent > 0


def test_a_real_servers_account_is_its_own_and_does_not_follow_from_the_seed(tmp_path):
    models = []
    for number in range(2):
        path = tmp_path / f"{number}.db"
        models.append(run_round(path)[1])
        assert path.stat().st_mode & 0o077 == 0
        assert path.with_suffix(".key").stat().st_mode & 0o077 == 0
        assert LedgerFile(path).genesis.mode == "deployment"
    assert any(not torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_the_account_is_what_dp_accounting_says(account):
    level = node_level(account)
    for round_number in range(1, 4):
        level.begin(NAMES, round_number)
        level.publish(level.collect([]))
    order = fixed_order(CONFIG.epsilon, CONFIG.delta)
    accountant = rdp.RdpAccountant(orders=[order], neighboring_relation=dpa.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dpa.SelfComposedDpEvent(dpa.PoissonSampledDpEvent(0.5, dpa.GaussianDpEvent(1.5)), 3))
    assert level._account.ledger.epsilon_spent == pytest.approx(accountant.get_epsilon(CONFIG.delta), rel=1e-6)


def test_an_account_without_its_database_is_refused(tmp_path):
    path = tmp_path / "node-level.db"
    node_level(path).close()
    path.unlink()
    with pytest.raises(BadInputError, match=r"node-level\.db: missing"):
        NodeAccount.open(path, CONFIG, seed=1)


def test_requests_carry_the_nodes_own_experts(account):
    federation = federation_with(node_level(account, rate=1.0))
    for request in ask(federation):
        name = federation.nodes[request.metadata.dst_node_id].fingerprint
        held = own_experts(name, experts=6, count=3, layers=1, seed=1, round_number=1)
        assert set(received(request, federation)) == set(parameters.shapes(PLAN.model, held))


def test_an_exhausted_account_ends_the_run_with_a_sentence(account):
    level = node_level(account, rate=1.0, noise=0.4)  # a round costs more than half of ε = 20
    level.begin(NAMES, 1)
    level.publish(level.collect(NAMES))
    with pytest.raises(BadInputError, match=r"node_privacy: epsilon 20 is spent, must leave room for round 2"):
        level.begin(NAMES, 2)


def test_a_run_that_lost_its_checkpoint_long_ago_is_told_so(account):
    level = node_level(account, noise=5.0)
    for round_number in range(1, 11):  # more than the ledger keeps
        level.begin(NAMES, round_number)
        level.publish(level.collect([]))
    with pytest.raises(BadInputError, match=r"node_privacy: round 1 was published before"):
        level.begin(NAMES, 1)


FITTING = {
    "federation.cohort": {"kind": "poisson", "rate": 0.5},
    "federation.assignment": "random",
    "federation.weights": "uniform",
    "federation.rounds": 3,
    "model.width": 8,
    "node_privacy": CONFIG.model_dump(),
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"federation.cohort": {"kind": "all"}}, r"federation\.cohort\.kind is all, must be poisson"),
        ({"federation.assignment": "balanced"}, r"federation\.assignment is balanced, must be random or all"),
        ({"federation.weights": "declared"}, r"federation\.weights is declared, must be uniform"),
        ({"federation.min_holders": 2}, r"federation\.min_holders is 2, must be 1"),
        ({"federation.capacities": [8, 4]}, r"federation\.capacities is \[8, 4\], must be \[\]"),
        ({"node_privacy.clip": 0.0}, r"node_privacy\.clip is 0\.0, must be"),
    ],
)
def test_what_would_depend_on_who_is_there_is_refused(changes, sentence):
    with pytest.raises(BadInputError, match=sentence):
        read_scenario(find("digits"), FITTING | changes)


def test_a_simulation_is_repeatable_audited_and_states_both_claims(tmp_path):
    scenario = read_scenario(find("digits"), FITTING)
    runs = []
    for number in range(2):
        run = RunDirectory.create(scenario, tmp_path / str(number))
        summary = simulate(scenario, run)
        runs.append(run)
        assert 0.99 * CONFIG.epsilon < summary.node_epsilon <= CONFIG.epsilon
        assert summary.epsilon <= 8.0
    assert (runs[0].path / "model/model.safetensors").read_bytes() == (
        runs[1].path / "model/model.safetensors"
    ).read_bytes()
    audit = audit_run(runs[0])
    assert (audit.verdict, audit.findings) == ("NOT_REFUTED", [])
    assert audit.node_level.epsilon == pytest.approx(summary.node_epsilon, rel=1e-3)
    assert "node as the unit" in write_report(runs[0]).read_text()


def with_account(run, folder, changes) -> RunDirectory:
    """Copy a run, its account told anew with the server's own key."""
    shutil.copytree(run.path, folder, dirs_exist_ok=True)
    history = LedgerFile(run.node_account)
    previous, told = history.genesis.hash, []
    for line in history.lines():
        entry = Entry.parse(line)
        fields = {name: change(entry) for name, change in changes.items()}
        told.append(replace(entry, **fields, prev_hash=previous))
        previous = told[-1].hash
    head = SignedHead.sign(_seeded_key(run.scenario.seed), history.genesis.ledger_id, len(told), previous)
    with (folder / run.node_account.name).open("wb") as stream:
        write_export(Told(history.genesis, told, head), stream)
    return RunDirectory(folder)


def test_the_audit_finds_models_that_nothing_paid_for(tmp_path):
    scenario = read_scenario(find("digits"), FITTING)
    run = RunDirectory.create(scenario, tmp_path / "run")
    simulate(scenario, run)
    for changes, sentence in (
        ({"mechanism_text": lambda e: e.mechanism_text.replace('"clip":"', '"clip":"9')}, "entry 1: clip is 9"),
        ({"mechanism_text": lambda e: e.mechanism_text.replace('"sigma":"', '"sigma":"9')}, "entry 1: sigma is 9"),
        ({"rng": lambda e: "os-entropy"}, "rng is 'os-entropy', the plan says seeded"),
        ({"releases": lambda e: '["model","loads"]'}, """releases is '["model","loads"]', the plan says ["model"]"""),
        ({"plan_hash": lambda e: "9" * 64}, "entry 1: plan is '999"),
        ({"run_id": lambda e: "8"}, "its charge id is not that of its run, round and the scenario's plan"),
        ({"round": lambda e: e.round + 3}, "round is 4, the plan has rounds 1 to 3"),
        ({"code_hash": lambda e: "c" * 64}, "entry 1: code is 'ccc"),
    ):
        findings = audit_run(with_account(run, tmp_path / "lying", changes)).findings
        assert any(sentence in finding for finding in findings), (sentence, findings)
    run.append_metrics(run.metrics()[-1] | {"round": 4, "accepted": 0})
    assert any("no charge paid for the model of round 4" in finding for finding in audit_run(run).findings)
    run.node_account.unlink()
    audit = audit_run(run)
    assert audit.verdict == "VIOLATED"
    assert any("nothing paid for the published models" in finding for finding in audit.findings)
