import pytest
import torch
from torch.nn.functional import cross_entropy

from fedsft_assets.model.training.chunked_loss import head_loss, head_only_at, summed_cross_entropy


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
def test_sum_and_gradient_equal_torch_cross_entropy(rows_at_a_time):
    chunk = 11 * rows_at_a_time
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(10, 11, generator=generator)).requires_grad_()
    reference = logits.detach().clone().requires_grad_()
    targets = torch.randint(11, (10,), generator=generator)

    (summed_cross_entropy(logits, targets, chunk) * 0.25).backward()
    (cross_entropy(reference, targets, reduction="sum") * 0.25).backward()

    torch.testing.assert_close(
        summed_cross_entropy(logits, targets, chunk), cross_entropy(reference, targets, reduction="sum")
    )
    torch.testing.assert_close(logits.grad, reference.grad)


def test_loss_of_bf16_logits_is_taken_in_fp32():
    logits = torch.linspace(-3, 3, 50).repeat(40, 1).bfloat16().requires_grad_()
    targets = torch.arange(40)
    result = summed_cross_entropy(logits, targets)
    torch.testing.assert_close(result, cross_entropy(logits.float(), targets, reduction="sum"))
    result.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_no_answer_gives_a_zero_that_can_be_differentiated():
    logits = torch.zeros(0, 5, requires_grad=True)
    result = summed_cross_entropy(logits, torch.zeros(0, dtype=torch.long))
    result.backward()
    assert result.item() == 0


def test_projection_sees_the_chosen_positions_only_within_the_block():
    head = torch.nn.Linear(3, 4)
    hidden = torch.randn(2, 5, 3)
    everywhere = head(hidden)
    with head_only_at(head, torch.tensor([1, 7])) as called:
        torch.testing.assert_close(head(hidden), everywhere.flatten(0, 1)[[1, 7]][None])
    assert called
    assert head(hidden).shape == (2, 5, 4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows_at_a_time", [1, 4, 100])
def test_loss_of_a_projection_and_all_gradients_equal_torch_in_any_chunks(rows_at_a_time, bias):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=bias)
    hidden = torch.randn(10, 6, requires_grad=True)
    targets = torch.randint(11, (10,))
    of_all = [hidden, *head.parameters()]

    expected = cross_entropy(head(hidden), targets, reduction="sum") * 0.25
    expected_gradients = torch.autograd.grad(expected, of_all)
    result = head_loss(hidden, head, targets, chunk=11 * rows_at_a_time) * 0.25
    torch.testing.assert_close(result, expected)
    for got, wanted in zip(torch.autograd.grad(result, of_all), expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_projection_that_is_not_trained_gets_no_gradient_and_hidden_states_do():
    head = torch.nn.Linear(6, 11).requires_grad_(False)
    hidden = torch.randn(4, 6, requires_grad=True)
    head_loss(hidden, head, torch.arange(4)).backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_no_target_gives_a_loss_of_zero_that_can_be_differentiated():
    head = torch.nn.Linear(3, 5)
    result = head_loss(torch.zeros(0, 3, requires_grad=True), head, torch.zeros(0, dtype=torch.long))
    result.backward()
    assert result.item() == 0
    assert head.weight.grad.abs().sum() == 0
