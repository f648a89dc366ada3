"""Tensors for other processes, on the host device."""

import collections
import multiprocessing
from collections.abc import Callable

import pytest
import torch
from torch import nn

import pygpukit_torch as pgk
from pygpukit_torch import MB, context_session, share, sharing
from pygpukit_torch.wrapping import Function, Wrapping


def test_a_shared_copy_is_charged_to_nobody(a: pgk.ExecutionContext) -> None:
    with context_session(a):
        x = torch.arange(MB).reshape(1024, 1024).t()
        used = a.usage().used
        copy = share(x)
        assert a.usage().used == used
    assert copy.is_shared()
    assert copy.is_contiguous()
    assert torch.equal(copy, x)
    x.zero_()
    assert copy[0, 1].item() == 1024


def test_history_stays_behind(a: pgk.ExecutionContext) -> None:
    with context_session(a):
        x = torch.ones(10, requires_grad=True) * 2
        assert not share(x).requires_grad
        assert share(x[:0]).numel() == 0


@pytest.mark.parametrize("value", [1, "tensor", torch.eye(2).to_sparse()])
def test_what_is_no_dense_tensor_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="share"):
        share(value)  # type: ignore[arg-type]


def test_another_process_reads_it(a: pgk.ExecutionContext) -> None:
    context = torch.multiprocessing.get_context("spawn")
    queue, answers = context.Queue(), context.Queue()
    with context_session(a):
        x = torch.arange(1000)
        queue.put(share(x))
        child = context.Process(target=total, args=(queue, answers))
        child.start()
    assert answers.get(timeout=60) == 499500
    child.join(60)
    assert child.exitcode == 0


def total(
    queue: "multiprocessing.Queue[torch.Tensor]", answers: "multiprocessing.Queue[int]"
) -> None:
    answers.put(int(queue.get(timeout=60).sum()))


def test_a_shared_copy_needs_no_room_in_the_budget(a: pgk.ExecutionContext) -> None:
    with context_session(a):
        x = torch.ones(a.max_vram - MB, dtype=torch.uint8)
        assert share(x)[-1].item() == 1


def test_tensors_are_found_in_what_is_sent() -> None:
    x, y, z = (torch.ones(1) for _ in range(3))
    pair = collections.namedtuple("pair", "a b")
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    sent = {"a": [x, (y, "text")], "b": pair(z, 3), "c": model}
    found = list(sharing._tensors_of(sent))
    assert [t.data_ptr() for t in found[:3]] == [t.data_ptr() for t in (x, y, z)]
    assert len(found) == 3 + 4 + 3


def test_what_pickles_is_sent_whatever_it_is(a: pgk.ExecutionContext) -> None:
    endless: list[object] = [1]
    endless.append(endless)
    with context_session(a):
        inside = torch.ones(1)
    for sent in (endless, [torch.eye(2).to_sparse()], [inside], list(range(10**6)), "text", None):
        assert sharing._context_in(sent) is None
    put = sharing._unless_in_a_context(lambda self, obj: self.append(obj))
    got: list[object] = []
    put(got, inside)
    assert got == [inside]


def test_wrappers_of_others_stay() -> None:
    class Owner:
        def call(self) -> str:
            return "torch"

    def wrap(what: str) -> Callable[[Function], Function]:
        return lambda before: lambda self: f"{what}({before(self)})"

    ours = Wrapping(Owner, "call", wrap("ours"))
    Owner.call = wrap("theirs")(Owner.call)  # type: ignore[method-assign]
    for _ in range(2):
        ours.put_on()
        assert Owner().call() == "ours(theirs(torch))"
        ours.take_off()
        assert Owner().call() == "theirs(torch)"
    ours.put_on()
    Owner.call = wrap("later")(Owner.call)  # type: ignore[method-assign]
    ours.take_off()
    assert Owner().call() == "later(ours(theirs(torch)))"
