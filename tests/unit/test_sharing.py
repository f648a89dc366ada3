"""Tensors for other processes, on the host device."""

import collections
import multiprocessing

import pytest
import torch
from torch import nn

import pygpukit_torch as pgk
from pygpukit_torch import MB, context_session, share, sharing


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


def test_tensors_are_found_in_what_is_sent() -> None:
    x, y, z = (torch.ones(1) for _ in range(3))
    Pair = collections.namedtuple("Pair", "a b")
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    sent = {"a": [x, (y, "text")], "b": Pair(z, 3), "c": model}
    found = list(sharing._tensors_of(sent))
    assert [t.data_ptr() for t in found[:3]] == [t.data_ptr() for t in (x, y, z)]
    assert len(found) == 3 + 4 + 3
