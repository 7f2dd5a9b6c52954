"""The average of weights: its recursion in exact arithmetic, warm-up, swapping, saving."""

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn

from flatdepth.training.ema import Ema


def one_weight(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, value)
    return layer


def set_to(model: nn.Linear, value: float) -> None:
    with torch.no_grad():
        model.weight.fill_(value)


def test_warm_up_worked_by_hand() -> None:
    """Weights 0, 1, 1: a_1 = 9/10, a_2 = 2/11 * 9/10 + 9/11 = 108/110."""
    model = one_weight(0.0)
    ema = Ema(model, 0.999)
    set_to(model, 1.0)
    ema.update(1)
    assert ema.state_dict()["weight"].item() == pytest.approx(9 / 10, rel=1e-15)
    ema.update(2)
    assert ema.state_dict()["weight"].item() == pytest.approx(108 / 110, rel=1e-15)


@pytest.mark.parametrize("decay", [Fraction(1, 2), Fraction(9, 10), Fraction(999, 1000)])
def test_the_recursion_in_exact_fractions(decay: Fraction) -> None:
    """200 updates: the warm-up is over for the first two decays and not for the third."""
    values = torch.randint(-8, 9, (201,), generator=torch.Generator().manual_seed(0)).tolist()
    model = one_weight(values[0])
    ema = Ema(model, float(decay))
    average = Fraction(values[0])
    for t, value in enumerate(values[1:], start=1):
        set_to(model, value)
        ema.update(t)
        d = min(decay, Fraction(t, t + 9))
        average = d * average + (1 - d) * value
    assert ema.state_dict()["weight"].item() == pytest.approx(float(average), rel=1e-12, abs=1e-12)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def changed(model: nn.Sequential, ema: Ema) -> None:
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.mul_(3.0)
    ema.update(1)


def test_applied_shows_the_average_and_gives_the_weights_back() -> None:
    model = two_layers()
    ema = Ema(model, 0.9)
    changed(model, ema)
    own, average = copy.deepcopy(model.state_dict()), copy.deepcopy(ema.state_dict())
    assert average.keys() == {"1.weight", "1.bias"}, "frozen weights take no part"
    with pytest.raises(RuntimeError, match="evaluation failed"), ema.applied():
        inside = copy.deepcopy(model.state_dict())
        raise RuntimeError("evaluation failed")
    assert all(torch.equal(inside[name], t) for name, t in average.items())
    assert torch.equal(inside["0.weight"], own["0.weight"])
    assert not torch.equal(inside["1.weight"], own["1.weight"])
    assert all(torch.equal(own[name], t) for name, t in model.state_dict().items())
    assert all(torch.equal(average[name], t) for name, t in ema.state_dict().items())


def test_the_optimiser_goes_on_with_the_same_weights_after_a_swap() -> None:
    models = [two_layers(), two_layers()]
    for model, looks in zip(models, (True, False), strict=True):
        ema = Ema(model, 0.9)
        optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.1)
        for t in (1, 2, 3):
            model(torch.ones(5, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(t)
            if looks:
                with ema.applied(), torch.no_grad():
                    model(torch.ones(1, 3))
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)


def test_a_saved_average_goes_on_bit_for_bit() -> None:
    model = two_layers()
    ema = Ema(model, 0.9)
    changed(model, ema)
    other_model = copy.deepcopy(model)
    other = Ema(other_model, 0.9)
    other.load_state_dict(copy.deepcopy(ema.state_dict()))
    for each, its in ((model, ema), (other_model, other)):
        changed(each, its)
    assert all(torch.equal(other.state_dict()[n], t) for n, t in ema.state_dict().items())
    with pytest.raises(KeyError, match=r"1\.weight"):
        other.load_state_dict({})


def test_decay_0_keeps_and_changes_nothing() -> None:
    model = two_layers()
    ema = Ema(model, 0.0)
    changed(model, ema)
    assert ema.state_dict() == {}
    own = copy.deepcopy(model.state_dict())
    with ema.applied():
        assert all(torch.equal(own[name], t) for name, t in model.state_dict().items())
