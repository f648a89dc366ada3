"""A process that a test asks: ``started(name, "tests.peer")``."""

import os
import sys
from typing import Any

from benchmarks import peers


def prepared(name: str) -> Any:
    if name == "broken":
        raise ImportError("of the peer")
    print("printed while it is prepared")
    return answer


def answer(question: Any) -> Any:
    print("printed by a library")
    match question:
        case "allocator":
            return os.environ.get("PYTORCH_ALLOC_CONF")
        case "raise":
            raise ArithmeticError("the first line\nthe second")
        case "raise nothing":
            raise AssertionError
        case "die":
            print("its last words", file=sys.stderr, flush=True)
            os._exit(3)
        case _:
            return question


if __name__ == "__main__":
    peers.serve(prepared)
