"""vLLM's scheduler beside the fast path of `fp8lab.server.fast_scheduler`: CPU a request and step while all decode.

    python tests/bench/bench_scheduler.py [--requests 512] [--rounds 5]

Both schedule the same requests without an engine, one step ahead as an engine does, in turn in one process; medians.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_fast_scheduler import Asked, AsyncScheduler, FastScheduler, answer, engine_config, request, scheduler

STEPS = 100


def microseconds(kind: type, requests: int) -> tuple[float, float]:
    """(schedule, update) in µs a request and step."""
    config = engine_config(False, block_size=16, max_num_seqs=requests, max_num_batched_tokens=8192, max_model_len=2048)
    held = scheduler(kind, config, blocks=requests * 100, v2=True)
    for number in range(requests):
        held.add_request(request(number, Asked(prompt=200, answer=400), caching=False))
    under_way, spent, steps = [], [0.0, 0.0], 0
    while steps < STEPS:
        begun = time.perf_counter()
        planned = held.schedule()
        took = [time.perf_counter() - begun, 0.0]
        under_way.append((planned, answer(planned, held)))
        if len(under_way) > 1:
            oldest = under_way.pop(0)
            begun = time.perf_counter()
            held.update_from_output(*oldest)
            took[1] = time.perf_counter() - begun
        if planned.total_num_scheduled_tokens == requests == len(held.running):
            spent, steps = [a + b for a, b in zip(spent, took, strict=True)], steps + 1
    return tuple(1e6 * each / STEPS / requests for each in spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=512, help="that decode at once (512)")
    parser.add_argument("--rounds", type=int, default=5, help="of both, in turn (5)")
    args = parser.parse_args()
    found = {AsyncScheduler: [], FastScheduler: []}
    for _ in range(args.rounds):
        for kind, each in found.items():
            each.append(microseconds(kind, args.requests))
    for kind, each in found.items():
        schedule, update = (median(part) for part in zip(*each, strict=True))
        together = [sum(one) for one in each]
        spread = f"{min(together):.1f} to {max(together):.1f}"
        print(
            f"{kind.__name__}: schedule {schedule:.1f}, update {update:.1f}, together {median(together):.1f} µs ({spread})"
        )
    slow, fast = (median([sum(one) for one in each]) for each in found.values())
    print(f"ratio: {slow / fast:.1f}x")


if __name__ == "__main__":
    main()
