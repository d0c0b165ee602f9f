"""What FedProx and SCAFFOLD do to the steps of a site."""

import pytest
import torch

from fedsft_assets.model.training.drift_correction import ControlVariates, Proximal
from fedsft_assets.model.training.local_training import train_round


def _distance(model, start) -> torch.Tensor:
    return sum((parameter - start[name]).square().sum() for name, parameter in model.named_parameters())


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_proximal_gradient_is_that_of_the_term_in_the_loss(model, scale):
    proximal = Proximal(mu=0.3)
    proximal.begin(model)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    (0.3 / 2 * _distance(model, start) * scale).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad.zero_()
    proximal.before_step(scale)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6 * scale)


def test_a_site_goes_less_far_the_larger_mu_is(model, tokens, make_plan):
    start = model.weights()

    def far(mu: float | None) -> float:
        model.load_weights(start)
        train_round(model, tokens, make_plan(local_epochs=2), 0, correction=Proximal(mu) if mu else None)
        return float(_distance(model, {name: start[name] for name in dict(model.named_parameters())}))

    assert far(10.0) < far(1.0) < far(None)


def test_directions_are_the_change_of_weights_per_learning_rate(model, tokens, make_plan):
    start = model.weights()
    control = ControlVariates({}, {})
    report = train_round(model, tokens, make_plan(), 0, correction=control)
    travelled = sum(point.learning_rate for point in report.points)
    changes = control.changes()
    assert changes.keys() == start.keys()
    for name, trained in model.weights().items():
        torch.testing.assert_close(changes[name], (start[name] - trained) / travelled, rtol=1e-4, atol=1e-6)


def test_directions_that_are_alike_correct_nothing(model, tokens, make_plan):
    start = model.weights()
    train_round(model, tokens, make_plan(), 0)
    without = model.weights()
    model.load_weights(start)
    alike = {name: torch.randn_like(tensor) for name, tensor in start.items()}
    train_round(model, tokens, make_plan(), 0, correction=ControlVariates(alike, alike))
    assert all(torch.equal(without[name], tensor) for name, tensor in model.weights().items())


def test_each_step_is_corrected_by_how_far_all_sites_differ_from_this_one(model):
    start = model.weights()
    everywhere = {name: torch.ones_like(tensor) for name, tensor in start.items()}
    here = {name: torch.full_like(tensor, 0.25) for name, tensor in start.items()}
    control = ControlVariates(everywhere, here)
    control.begin(model)
    control.after_step(0.1)
    control.after_step(0.3)
    for name, tensor in model.weights().items():
        torch.testing.assert_close(tensor, start[name] - 0.4 * 0.75, rtol=0, atol=1e-6)
    for name, change in control.changes().items():
        torch.testing.assert_close(change, torch.full_like(start[name], 0.75 - 1.0), rtol=0, atol=1e-5)
