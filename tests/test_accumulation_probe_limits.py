"""Watching modules where it is at its limits: errors, checkpoints, gradients that come twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from watching import kept, run

from trainers.accumulation.probes import Place, Record, Sight, watched


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are faster so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Caught(nn.Module):
    """Does something else where its part fails."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, given: Tensor) -> Tensor:
        try:
            out: Tensor = self.inner(given)
        except RuntimeError:
            out = given * torch.rand(())
        return out


def test_hooks_of_a_module_are_its_own_code() -> None:
    def count(module: nn.Module, args: object) -> None:
        module.get_buffer("seen").add_(torch.rand(()))

    def fail(module: nn.Module, args: object) -> None:
        raise RuntimeError("not today")

    inner = nn.Linear(4, 4)
    inner.register_buffer("seen", torch.zeros(()))
    hook = inner.register_forward_pre_hook(count)
    model, given = Caught(inner), torch.randn(6, 4)
    with watched(model, Sight()) as watch:
        model(given)
        assert watch.random == {"inner": 1} and watch.changed == {"inner": {"seen"}}
        hook.remove()
        inner.register_forward_pre_hook(fail, prepend=True)  # in front of the one that watches
        model(given)
        assert watch.random == {"inner": 1, "": 1}


class Failing(nn.Module):
    """Goes on after an error within."""

    def __init__(self, caught: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(5, 3))
        self.after = nn.Dropout(0.5)
        self.caught = caught

    def forward(self, given: Tensor) -> Tensor:
        try:
            out: Tensor = self.inner(given)
        except RuntimeError:
            if not self.caught:
                raise
            out = self.after(given) + torch.rand(())
        return out


def test_errors_leave_no_hooks() -> None:
    model = Failing(caught=False)
    with pytest.raises(RuntimeError, match="shapes"), watched(model, Record()):
        model(torch.randn(2, 3))
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    model.caught = True
    record = Record()
    with watched(model, record) as watch:
        model(torch.randn(2, 3))
    assert watch.random == {"after": 1, "": 1}
    assert [place.module for place in record.outputs] == ["inner.0", "after", ""]


def test_gradients_that_come_twice_are_not_kept() -> None:
    linear, record = nn.Linear(3, 1), Record()
    model, given = nn.Sequential(linear, nn.Tanh()), torch.randn(4, 3, requires_grad=True)

    def penalty() -> Tensor:
        (slope,) = torch.autograd.grad(model(given).sum(), given, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), linear.weight)[0]

    plain = penalty()
    with watched(model, record):
        assert torch.equal(penalty(), plain)
    assert len(record.outputs) == 3
    assert record.output_gradients.keys() == {Place("1", 0, 0), Place("", 0, 0)}  # the first linear layer's came twice


class Checkpointed(nn.Module):
    """Runs its inner part again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, given: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, self.first(given), use_reentrant=self.reentrant)
        return out


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_calls_again_in_backward(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, record = Checkpointed(reentrant), Record()
    given = torch.randn(5, 4)
    plain = {key: each.clone() for key, each in run(model, given).items()}
    found = kept(model, given, record)
    assert all(torch.equal(found[key], each) for key, each in plain.items())
    assert torch.equal(record.outputs[Place("inner.0", 0, 0)], record.outputs[Place("inner.0", 1, 0)])
    assert Place("inner.0", 2, 0) not in record.outputs
    # Gradients are those of the calls that made the graph.
    assert (Place("inner.0", int(reentrant), 0) in record.output_gradients) and Place("first", 0, 0) in record.outputs


def test_scripted_and_transformed_modules_go_unseen() -> None:
    class Inner(torch.jit.ScriptModule):
        pass

    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    given, record = torch.randn(4, 3), Record()
    with watched(model, record):
        parameters = dict[str, Tensor](model.named_parameters())
        slopes = torch.func.vmap(torch.func.grad(lambda x: torch.func.functional_call(model, parameters, (x,)).sum()))
        assert slopes(given).shape == (4, 3) and not record.outputs
        torch.func.functional_call(model, parameters, (given,)).sum().backward()
        assert len(record.outputs) == 3 == len(record.output_gradients)
    scripted = nn.Sequential(nn.Linear(3, 3), Inner())
    with watched(scripted, record):
        assert not scripted[1]._forward_hooks and scripted[0]._forward_hooks
