"""Latencies of requests that one server handles one after the other, and what is said of them."""

import math
import random
import time
from collections.abc import Callable

AWAKE = 0.0003  # seconds before an arrival, so that it is not late by what the system's sleep adds


def percentile(values: list[float], part: float) -> float:
    """Return the least of the values that ``part`` of them do not exceed: of few the largest."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def poisson_arrivals(mean_gap: float, count: int, seed: int) -> list[float]:
    """Return when ``count`` requests arrive, in seconds: with exponential gaps, from the seed."""
    gaps = random.Random(seed)
    arrivals: list[float] = []
    moment = 0.0
    for _ in range(count):
        moment += gaps.expovariate(1 / mean_gap)
        arrivals.append(moment)
    return arrivals


def back_to_back(serve: Callable[[], object], count: int, seconds: float) -> list[float]:
    """Serve ``count`` requests, none of them begun after ``seconds``; how long each took."""
    latencies: list[float] = []
    begin = last = time.perf_counter()
    while len(latencies) < count and last - begin < seconds:
        serve()
        moment = time.perf_counter()
        latencies.append(moment - last)
        last = moment
    return latencies


def open_loop(serve: Callable[[], object], arrivals: list[float], seconds: float) -> list[float]:
    """Serve requests as they arrive; how long it took from the arrival of each to its end.

    One that arrives while another is served waits for it. After ``seconds`` no more are served;
    those that have arrived by then count with the time that they have waited, which is too little.
    """
    latencies: list[float] = []
    begin = time.perf_counter()
    for arrival in arrivals:
        if time.perf_counter() - begin >= seconds:
            break
        _sleep_until(begin + arrival)
        serve()
        latencies.append(time.perf_counter() - begin - arrival)
    over = time.perf_counter() - begin
    waiting = [over - arrival for arrival in arrivals[len(latencies) :] if arrival < over]
    return latencies + waiting


def _sleep_until(moment: float) -> None:
    left = moment - time.perf_counter() - AWAKE
    if left > 0:
        time.sleep(left)
    while time.perf_counter() < moment:
        pass
