"""What `audit model module:function` makes of functions that fail, or return something else."""

from __future__ import annotations

import pytest

from conclave.audit.model import audit_own
from conclave.base.errors import BadInputError

MODULE = """
import sys
import torch
from torch import nn

x, y = torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)
net, batch = nn.Linear(2, 2), {"x": x}
def loss(b): return net(b["x"]).square().sum(1)
def raises(): raise KeyError("weights")
def ends(): sys.exit(3)
def nothing(): return None
def four(): return 1, 2, 3, 4
def no_module(): return 7, loss, batch
def no_loss(): return net, 7, batch
def no_batch(): return net, loss, [x]
def empty(): return net, loss, {}
def few(): return net, loss, {"x": x[:3]}
def uneven(): return net, loss, {"x": x, "y": y[:3]}
def numbers(): return net, loss, {"x": x, "y": [1, 2, 3, 4]}
def scalar(): return net, loss, {"x": x, "y": torch.tensor(1)}
def unnamed(): return net, loss, {1: x}
def mean(): return net, lambda b: loss(b).mean(), batch
def takes(argument): return net, loss, batch
seven = 7
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    (tmp_path / "brought_here.py").write_text(MODULE)
    (tmp_path / "broken_here.py").write_text("def broken(:\n")
    (tmp_path / "ending_here.py").write_text("raise SystemExit(2)\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("brought_here:raises", "brought_here:raises cannot be called: KeyError: 'weights'"),
        ("brought_here:ends", "cannot be called: it ends the process"),
        ("brought_here:takes", "cannot be called: TypeError"),
        ("brought_here:seven", "cannot be called: TypeError"),
        ("brought_here:absent", "cannot be called: AttributeError"),
        ("absent_here:any", "cannot be called: ModuleNotFoundError"),
        ("broken_here:any", "cannot be called: SyntaxError"),
        ("ending_here:any", "cannot be called: it ends the process"),
        ("brought_here:nothing", "batch of named tensors with 4 or more examples), not NoneType"),
        ("brought_here:four", "not a tuple of 4"),
        ("brought_here:no_module", "its module is int"),
        ("brought_here:no_loss", "its example_loss is int, which cannot be called"),
        ("brought_here:no_batch", "its batch is list"),
        ("brought_here:empty", "its batch is empty"),
        ("brought_here:few", "its batch has 3"),
        ("brought_here:uneven", "its batch has 4 at x and 3 at y"),
        ("brought_here:numbers", "its batch has list at y"),
        ("brought_here:scalar", "at y whose first axis is not the example"),
        ("brought_here:unnamed", "the key 1, which is no name"),
        ("brought_here:mean", "brought_here:mean: example_loss returns a tensor of shape []"),
    ],
)  # fmt: skip
def test_it_is_said_in_one_sentence(path, sentence):
    with pytest.raises(BadInputError) as caught:
        audit_own(path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
