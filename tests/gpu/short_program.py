"""A short form of what the suite does, for compute-sanitizer."""

import threading

import torch

import pygpukit_torch as pgk
from pygpukit_torch import GB, MB, context_session, create_context


def main() -> None:
    pgk.initialize(device="cuda", total_vram=2 * GB)
    a, b = create_context("a", 256 * MB), create_context("b", 256 * MB, base_vram=64 * MB)
    data = {}
    for context in (a, b):
        with context_session(context):
            data[context] = torch.arange(4 * MB, device="cuda")
            model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()).cuda()
            model(torch.randn(16, 64, device="cuda")).sum().backward()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                doubled = data[context] * 2
            doubled.record_stream(torch.cuda.current_stream())
            torch.cuda.current_stream().wait_stream(side)
            assert doubled[-1].item() == 2 * (4 * MB - 1)
            del doubled

    def churn(context: pgk.ExecutionContext) -> None:
        for size in range(1, 40):
            with context_session(context):
                try:
                    x = torch.full((size * 4 * MB,), size, dtype=torch.uint8, device="cuda")
                    assert x[-1].item() == size
                except torch.OutOfMemoryError:
                    pass

    workers = [threading.Thread(target=churn, args=(context,)) for context in (a, b)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with context_session(a):
        graph = torch.cuda.CUDAGraph()
        x = torch.ones(1000, device="cuda")
        with torch.cuda.graph(graph):
            y = x * 3
        graph.replay()
    assert y.sum().item() == 3000
    del graph, y, x
    assert data[a][-1].item() == data[b][-1].item() == 4 * MB - 1
    torch.cuda.empty_cache()
    data.clear()
    a.destroy()
    b.destroy()
    print("done")


if __name__ == "__main__":
    main()
