"""Does this load generator measure what `vllm bench serve` measures?

    python tests/bench/bench_agreement.py [--rounds 3]

One real vLLM server with the emulated GPU (no time dilation), the same trace (in ShareGPT's form for vLLM's client),
the same constant arrivals, the two clients in turn. Prints both, round by round, and the ratio of the means.
TTFT may differ: what a client adds to it is shown by its CPU and by the burst of `bench_client.py`.
"""

import argparse
import dataclasses
import statistics

import fp8lab as lab
from fp8lab.load import vllm_bench
from fp8lab.load.endpoint import Endpoint
from fp8lab.load.level import measure_level
from fp8lab.models.checkpoints import model_folder

COMPARED = ("output_token_throughput", "mean_tpot_ms", "peak_concurrent_requests_vllm", "mean_ttft_ms", "p99_ttft_ms")
CONSTANT = float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=12)
    parser.add_argument("--requests", type=int, default=240)
    args = parser.parse_args()
    profile = lab.load_profile("emulated-h100")
    profile = dataclasses.replace(profile, emulation=dataclasses.replace(profile.emulation, time_dilation=1.0))
    trace = lab.sharegpt_like(args.requests)
    due = lab.arrival_times(args.requests, args.rate, burstiness=CONSTANT)
    ours, theirs = [], []
    with lab.serve(profile, "fp8") as server:
        endpoint = Endpoint(server.base_url, server.model, server.api_key)
        for _ in range(args.rounds):
            ours.append(measure_level(endpoint, trace, due, name="fp8lab").summary)
            tokenizer = str(model_folder(profile.model.shapes))
            theirs.append(vllm_bench.run(endpoint, trace, args.rate, tokenizer=tokenizer, burstiness=CONSTANT))
    print(f"{'':<32}{'fp8lab':>28}{'vllm bench serve':>28}{'ratio of means':>16}")
    for metric in COMPARED:
        mine, others = ([summary[metric] for summary in side] for side in (ours, theirs))
        shown = ["  ".join(f"{value:.4g}" for value in values) for values in (mine, others)]
        ratio = statistics.mean(mine) / statistics.mean(others)
        print(f"{metric:<32}{shown[0]:>28}{shown[1]:>28}{ratio:>16.3f}")
    tokens = {summary["output_tokens"] for summary in (*ours, *theirs)}
    print(f"output tokens in each run: {tokens}")


if __name__ == "__main__":
    main()
