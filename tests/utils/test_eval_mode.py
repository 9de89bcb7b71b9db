"""A model in eval mode for a while."""

import pytest
from torch import nn

from cbd_trl.utils.modeling import in_eval_mode


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_as_it_was_whatever_happens(training: bool) -> None:
    model = nn.Sequential(nn.Dropout()).train(training)
    with in_eval_mode(model):
        assert not model.training and not model[0].training
    assert model.training is model[0].training is training
    with pytest.raises(KeyboardInterrupt), in_eval_mode(model):
        raise KeyboardInterrupt
    assert model.training is training
