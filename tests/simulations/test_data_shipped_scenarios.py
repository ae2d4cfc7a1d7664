"""Shipped scenarios by name, and what a run config may say."""

from __future__ import annotations

import pytest

from conclave.base.errors import BadInputError
from conclave.server.scenario import parse_scenario, read_scenario
from conclave.simulations.run_config import RUNS_VARIABLE, scenario_text, simulated_run_dir
from conclave.simulations.shipped import find, shipped


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_scenario_can_be_carried_out_and_is_named_as_its_file(name):
    scenario = read_scenario(find(name))
    assert scenario.name == name
    assert scenario.description
    assert scenario.plan().rounds == scenario.federation.rounds


def test_a_run_config_gives_toml_a_name_or_nothing():
    digits = find("digits").read_text()
    assert scenario_text("") == scenario_text("digits") == scenario_text(digits) == digits
    assert parse_scenario(scenario_text("stdlib-text"), where="x").name == "stdlib-text"


@pytest.mark.parametrize("value", ["/etc/passwd", "../secret.toml", "nonsense", "digits.toml"])
def test_a_run_config_never_names_a_file(value):
    with pytest.raises(BadInputError, match="must be TOML or one of"):
        scenario_text(value)


def test_run_directories_without_a_name_follow_the_run(monkeypatch, tmp_path):
    assert simulated_run_dir("/somewhere", 7).as_posix() == "/somewhere"
    monkeypatch.setenv(RUNS_VARIABLE, str(tmp_path))
    assert simulated_run_dir("", 7) == tmp_path / "flower-7"
    monkeypatch.delenv(RUNS_VARIABLE)
    assert simulated_run_dir("", 7).name == "flower-7"
