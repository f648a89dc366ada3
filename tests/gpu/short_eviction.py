"""A short form of the suite of evictions, for compute-sanitizer."""

import torch

import pygpukit_torch as pgk
from pygpukit_torch import GB, MB, context_session, create_context


def main() -> None:
    pgk.initialize(device="cuda", total_vram=192 * MB, host_backup=2 * GB)
    contexts = [create_context(name, 160 * MB) for name in "ab"]
    data = {}
    for mark, context in enumerate(contexts, start=1):
        with context_session(context):
            data[context] = torch.full((120 * MB // 4,), mark, dtype=torch.int32, device="cuda")
    for turn in range(4):
        for mark, context in enumerate(contexts, start=1):
            with context_session(context):
                assert data[context].min().item() == data[context].max().item() == mark + turn
                data[context].add_(1)
    first = contexts[0]
    first.evict()
    assert data[first].sum(dtype=torch.int64).item() == 5 * 120 * MB // 4
    first.restore()
    first.evict()
    torch.cuda.synchronize()
    data.clear()
    for context in contexts:
        context.destroy()
    print("done")


if __name__ == "__main__":
    main()
