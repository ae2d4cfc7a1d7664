"""What stands between a node and its first round: each thing is checked, and what to do if it is not right."""

from __future__ import annotations

import email.utils
import shutil
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx

from conclave.base.errors import BadInputError, ConclaveError, UnavailableError
from conclave.clients.approvals import Approvals
from conclave.clients.capacity import room_for
from conclave.clients.folder.node_directory import NodeDirectory
from conclave.clients.folder.node_key import check_node_key
from conclave.data.private_data import PrivateData
from conclave.data.sources import GROUP
from conclave.deployment.flower.runtime import check_flower
from conclave.deployment.host.certificates import days_left
from conclave.deployment.host.fixed_layout import check_layout
from conclave.deployment.host.outward_proxy import check_outward_proxy
from conclave.deployment.node.loading import read_data
from conclave.privacy.accounting.sensible_budget import check_delta, doubts
from conclave.privacy.ledger.genesis import Side
from conclave.privacy.ledger.reading.history import LedgerFile
from conclave.privacy.ledger.reading.spending import budget_of, forecast
from conclave.privacy.ledger.upkeep.data_place import fingerprint
from conclave.protocol.charges import whole_cost
from conclave.protocol.messages import ProtocolError
from conclave.protocol.plan import Plan
from conclave.server.scenario import Scenario

_ENOUGH_DISK_MB = 1024
_MOST_BEHIND_S = 120.0
_MOST_AHEAD_S = 4.0
"""Flower's server takes nothing that was signed more than 5 s in what is its future, or 5 minutes in its past."""
_SOON_DAYS = 14.0
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Check:
    """One thing that was checked. problem: what is wrong and what to do; None if it is in order."""

    what: str
    found: str
    problem: str | None = None


def check_node(directory: NodeDirectory, scenario: Scenario | None) -> list[Check]:
    """Check everything that a node needs; ledgers are opened, and nothing is charged.

    Args:
        scenario: also check whether the data suit its model, and the budget its plan.
    """
    checks = [
        _try("program", lambda: _program()),
        _try("data", lambda: _data(directory, scenario)),
        _try("ledger", lambda: _ledger(directory)),
        _try("fingerprint", lambda: _fingerprint(directory)),
        _try("delta", lambda: _delta(directory)),
        _try("disk", lambda: _disk(directory)),
        _try("owner", lambda: _owner(directory)),
    ]
    if scenario is not None:
        checks.append(_try("budget", lambda: _budget(directory, scenario)))
        if scenario.evaluation is not None:
            checks.append(_try("evaluation", lambda: _evaluation(directory, scenario)))
    if directory.config.server is None:
        return [*checks, Check("server", "none", "node.toml has no [server]: add address and ca")]
    return [
        *checks,
        _try("node key", lambda: _key(directory)),
        _try("certificate", lambda: _certificate(directory)),
        _try("server", lambda: look_at_server(directory)),
    ]


def _try(what: str, look: Callable[[], str]) -> Check:
    try:
        return Check(what, look())
    except ConclaveError as error:
        return Check(what, "not in order", str(error))


def _program() -> str:
    check_flower()
    return "the tested Flower is installed"


def _data(directory: NodeDirectory, scenario: Scenario | None) -> str:
    data = read_data(directory)
    if scenario is not None:
        mismatch = data.schema.mismatch(scenario.model)
        if mismatch is not None:
            raise BadInputError(f"the data do not suit scenario {scenario.name}: {mismatch}")
    if directory.held_out is not None:
        entries = sum(LedgerFile(directory.files(side).path).head.seq for side in directory.sides)
        check_layout(directory.layout, data.stored_as, entries)
    bad = f", {len(data.bad)} bad rows are left out (the log names them)" if data.bad else ""
    return f"{len(next(iter(data.records.values())))} records{_groups(data)}{bad}"


def _groups(data: PrivateData) -> str:
    """Return how many groups there are and how large: for the owner, who may notice that one person has become two."""
    if GROUP not in data.records:
        return ""
    sizes = data.records[GROUP].unique(return_counts=True)[1]
    return f" in {len(sizes)} groups, the largest of {int(sizes.max())}"


def _ledger(directory: NodeDirectory) -> str:
    for side in directory.sides:
        directory.open_ledger(side).close()
    return "opens, and its witness agrees"


def _fingerprint(directory: NodeDirectory) -> str:
    return f"{fingerprint(directory.data)}, for you alone: a node whose data have the same has the same people"


def _delta(directory: NodeDirectory) -> str:
    """Compare the budget with the number of units that is declared now, which may have changed since ``init``."""
    budget, units = directory.config.budget, directory.config.dataset.declared_size
    check_delta(budget.delta, units, where="budget.delta, which cannot be changed,")
    return "; ".join(doubts(budget.epsilon, budget.delta, units)) or f"well below 1 / units ({units})"


def _disk(directory: NodeDirectory) -> str:
    free = shutil.disk_usage(directory.training.path.parent).free // 2**20
    if free < _ENOUGH_DISK_MB:
        raise BadInputError(f"{free} MiB free at {directory.training.path.parent}, should be {_ENOUGH_DISK_MB}")
    return f"{free} MiB free"


def _owner(directory: NodeDirectory) -> str:
    """Check what lets the node work at all, whatever is asked of it."""
    approvals = Approvals(directory.plans, hours=directory.config.limits.hours)
    if approvals.paused:
        raise BadInputError(f"paused, so that every request is refused; conclave node resume {directory.path} goes on")
    hours = "at any time"
    if directory.config.limits.hours is not None:
        hours = f"{directory.config.limits.hours}, {'which is now' if approvals.open else 'which is not now'}"
    waiting = approvals.count_waiting()
    return f"works {hours}" + (f"; plans that wait for conclave node approve: {waiting}" if waiting else "")


def _budget(directory: NodeDirectory, scenario: Scenario) -> str:
    plan = scenario.plan()
    try:
        order = float(LedgerFile(directory.training.path).genesis.order)
        directory.config.policy.check(plan, scenario.name, order)
        room_for(plan)
    except ProtocolError as error:
        raise BadInputError(f"the policy refuses scenario {scenario.name}: {error}") from error
    return _share(directory, scenario.name, plan, "training")


def _evaluation(directory: NodeDirectory, scenario: Scenario) -> str:
    plan = scenario.plan()
    if directory.held_out is None:
        return "none here, for no units are held out; the node trains"
    try:
        directory.config.policy.check_evaluation(plan)
    except ProtocolError as error:
        return f"none here, for {error}; the node trains"
    return _share(directory, scenario.name, plan, "held-out")


def _share(directory: NodeDirectory, scenario: str, plan: Plan, side: Side) -> str:
    charges = whole_cost(plan, side)
    if not charges:
        raise BadInputError(f"scenario {scenario} asks for a release without privacy: no node makes one")
    ledger = LedgerFile(directory.files(side).path)
    expected = forecast(budget_of(ledger), ledger.genesis, charges)
    if not expected.fits:
        raise BadInputError(f"scenario {scenario} needs {expected.share:.1%} of the budget, more than is left")
    return f"{scenario} takes {expected.share:.1%} of the budget, epsilon {expected.epsilon_after:.4f} after it"


def _key(directory: NodeDirectory) -> str:
    key, _ = directory.connection_files()
    check_node_key(key)
    return f"its public half is {key}.pub"


def _certificate(directory: NodeDirectory) -> str:
    _, ca = directory.connection_files()
    left = days_left(ca)
    if left < _SOON_DAYS:
        raise BadInputError(f"{ca}: good for {left:.0f} more days; get the server's new one")
    return f"good for {left:.0f} days"


def look_at_server(directory: NodeDirectory) -> str:
    """Reach for the server; return what was found.

    Raises:
        BadInputError: it has another certificate, a proxy cannot be used, or the clocks differ.
        UnavailableError: it cannot be reached.
    """
    check_outward_proxy()
    server = directory.config.server
    if server is None:
        raise BadInputError("node.toml has no [server]")
    _, ca = directory.connection_files()
    try:
        # As the SuperNode does it, through the proxy that HTTPS_PROXY names, if any.
        with httpx.Client(verify=ssl.create_default_context(cafile=ca), timeout=_PATIENCE_S) as client:
            date = client.get(f"https://{server.address}/").headers.get("Date")
    except (ssl.SSLError, httpx.ConnectError) as error:
        if "CERTIFICATE" in str(error).upper():
            raise BadInputError(f"{server.address}: its certificate does not hold against {ca} ({error})") from error
        raise UnavailableError(
            f"{server.address}: not reachable; look at the address, the firewall and the server"
        ) from error
    except (OSError, httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise UnavailableError(f"{server.address}: not reachable ({type(error).__name__}: {error})") from error
    skew = _skew(date)
    if skew is not None and not -_MOST_BEHIND_S <= skew <= _MOST_AHEAD_S:
        raise BadInputError(f"this machine's clock is {skew:+.0f} s from the server's; set it (NTP)")
    return "reachable, its certificate is right" + ("" if skew is None else f", clocks {skew:+.0f} s apart")


def _skew(date: str | None) -> float | None:
    if date is None:
        return None
    try:
        return (datetime.now(UTC) - email.utils.parsedate_to_datetime(date)).total_seconds()
    except (ValueError, TypeError):
        return None
