"""Opacus's own grad-sample test cases on our mode: layers, shapes and inputs are theirs, the truth is microbatches."""

from __future__ import annotations

import pytest
import torch
from microbatches import alone, relative_error
from opacus.tests.grad_samples.conv1d_test import Conv1d_test
from opacus.tests.grad_samples.conv2d_test import Conv2d_test
from opacus.tests.grad_samples.embedding_test import Embedding_test
from opacus.tests.grad_samples.group_norm_test import GroupNorm_test
from opacus.tests.grad_samples.layer_norm_test import LayerNorm_test
from opacus.tests.grad_samples.linear_test import Linear_test
from opacus.tests.grad_samples.rms_norm_test import RMSNorm_test
from torch import nn

from conclave.privacy.bookkeeping import Bookkeeper, Units

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class OnOurMode:
    """Replaces what the cases are run on."""

    def run_test(self, x, module, batch_first=True, **_):
        x = x if batch_first else x.transpose(0, 1)
        if not len(x):
            return  # an empty sample is a step of pure noise: no pass is run
        module = nn.Sequential(module)

        def loss(batch):
            return torch.sin(module(batch["x"])).flatten(1).sum(1)

        truth = alone(module, loss, {"x": x}, torch.arange(len(x)))
        bookkeeper = Bookkeeper(module)
        found = bookkeeper.gradients(lambda: loss({"x": x}), Units.one_each(len(x)))
        bookkeeper.close()
        assert not bookkeeper.fallbacks
        gradients = found.per_unit()
        for p, gradient in gradients.items():
            assert relative_error(gradient, truth[p]) < 1e-5
        for p, bound_U in zip(found.reached, found.squared_bound_PU.sqrt(), strict=True):
            # Of what is summed: a unit that runs alone is normalised with other last bits, and where its gradient
            # cancels, they are all that is left of it.
            assert (bound_U >= gradients[p].flatten(1).double().norm(dim=1)).all()


class TestLinear(OnOurMode, Linear_test):
    pass


class TestConv1d(OnOurMode, Conv1d_test):
    pass


class TestConv2d(OnOurMode, Conv2d_test):
    test_asymetric_dilation_and_kernel_size = None  # looks at Opacus's own module; that case is in test_layers


class TestEmbedding(OnOurMode, Embedding_test):
    pass


class TestLayerNorm(OnOurMode, LayerNorm_test):
    pass


class TestRMSNorm(OnOurMode, RMSNorm_test):
    pass


class TestGroupNorm(OnOurMode, GroupNorm_test):
    pass


for _theirs in (Conv1d_test, Conv2d_test, Embedding_test, GroupNorm_test, LayerNorm_test, Linear_test, RMSNorm_test):
    globals().pop(_theirs.__name__)  # only ours are to be run from here
del _theirs
