"""The Flower ServerApp of simulations and of ``flwr run``."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from conclave.server.run import run_scenario
from conclave.server.run_directory import RunDirectory
from conclave.server.scenario import parse_scenario
from conclave.simulations.run_config import scenario_text, simulated_run_dir

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario in the run config: TOML, a shipped name, or nothing for the default."""
    scenario = parse_scenario(scenario_text(str(context.run_config["scenario"])), where="run config")
    path = simulated_run_dir(str(context.run_config["run-dir"]), context.run_id)
    started_elsewhere = (path / "scenario.toml").is_file()
    run = RunDirectory(path) if started_elsewhere else RunDirectory.create(scenario, path)
    run_scenario(grid, scenario, run, str(context.run_id))
