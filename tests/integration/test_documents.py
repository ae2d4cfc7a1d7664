"""What the documents show works as shown."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_example_of_private_training_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "private-training.md").read_text(), re.DOTALL)
    exec(compile(example, "private-training.md", "exec"), {})
    assert "'rdp'" in capsys.readouterr().out
