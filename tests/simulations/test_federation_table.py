"""The table of federations: what is finished is not run again, whatever interrupted it; what changed is."""

from __future__ import annotations

import json

import pytest
from conftest import load_benchmark


@pytest.fixture(scope="module")
def script():
    return load_benchmark("federation_table")


def test_every_row_keeps_data_seed_noise_and_budget(script):
    cells = {row: script.cell("digits", row, 5) for row in script.ROWS}
    for scenario in cells.values():
        assert scenario.seed == 5
        for section in ("data", "partition", "privacy", "training"):
            assert getattr(scenario, section) == getattr(cells["moe-1/2"], section)
        assert scenario.plan().noise_multiplier == cells["moe-1/2"].plan().noise_multiplier
    held = {row: (s.federation.experts_per_node, s.model.experts.top_k) for row, s in cells.items()}
    assert held == {
        "dense-total": (1, 1), "dense-active": (1, 1), "moe-all": (8, 2), "moe-1/2": (4, 2), "moe-1/4": (2, 2),
        "moe-1/8": (1, 1),
    }  # fmt: skip


def test_a_finished_cell_is_skipped_and_one_cut_short_is_run_again(script, tmp_path):
    out, ran = tmp_path / "out.jsonl", []

    def do(data, row, seed, scenario):
        ran.append((row, seed))
        if len(ran) == 3:
            raise KeyboardInterrupt
        scenario_hash = script.key(data, row, seed, scenario)[-1]
        return {"data": data, "row": row, "seed": seed, "accuracy": 0.5, "scenario": scenario_hash}

    rows = ["moe-all", "moe-1/2"]
    with pytest.raises(KeyboardInterrupt):
        list(script.table(["digits"], rows, [1, 2], out, do))
    assert ran == [("moe-all", 1), ("moe-all", 2), ("moe-1/2", 1)]
    text = out.read_text()
    out.write_text(text[: text.rindex("{") + 20])  # the second cell's line was cut short
    ran[:] = [None] * 3
    cells = list(script.table(["digits"], rows, [1, 2], out, do))
    assert ran[3:] == [("moe-all", 2), ("moe-1/2", 1), ("moe-1/2", 2)]
    assert [(cell["row"], cell["seed"]) for cell in cells] == [(row, seed) for row in rows for seed in (1, 2)]
    assert list(script.table(["digits"], rows, [1, 2], out, do)) == cells
    assert len(ran) == 6
    changed = [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")]
    changed[0]["scenario"] = "0" * 16
    out.write_text("".join(json.dumps(cell) + "\n" for cell in changed))
    list(script.table(["digits"], rows, [1, 2], out, do))
    assert ran[6:] == [("moe-all", 1)]
