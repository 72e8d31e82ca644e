"""fp8lab: what does FP8 really buy when vLLM serves a model on a Hopper GPU?

    import fp8lab as lab

    profile = lab.load_profile("auto")
    with lab.serve(profile, "bf16") as server:
        bf16 = lab.load_test(server, rate=50, requests=1000)

Names are imported when they are first used, so that `import fp8lab` takes no time.
"""

import importlib

_HOMES = {
    "errors": (
        "BadInput",
        "Fp8labError",
        "InUse",
        "LevelFailed",
        "NotWritten",
        "RunDamaged",
        "RunMismatch",
        "ServerFailed",
    ),
    "experiment.quality": (
        "QualityTask",
        "check_weights",
        "checkpoint_folder",
        "measure_quality",
        "quality_profile",
        "read_text",
    ),
    "experiment.speed": ("load_test", "measure", "serve", "start_server", "trace_for", "warm_up"),
    "experiment.max_rate": ("find_limit",),
    "metrics.slo": ("MLPERF_INTERACTIVE", "MLPERF_SERVER", "SLO", "required_requests"),
    "experiment.plan": ("plan_table",),
    "config.profile": ("Level", "Profile", "load_profile", "profile_names"),
    "report.across": ("claims_across", "worth_table"),
    "report.capacity": ("attainment_table", "capacity_plan", "limit_table"),
    "report.claims": ("claims_table", "judge"),
    "report.fair": (
        "ablation_table",
        "equal_load_table",
        "kv_table",
        "limits_table",
        "paging_table",
        "roofline_table",
        "throughputs_table",
        "validity_table",
    ),
    "report.quality": (
        "answers_table",
        "asked_table",
        "divergence_figure",
        "formats_figure",
        "formats_table",
        "kv_rounding_table",
        "parting_figure",
        "published_table",
        "quality_table",
        "weights_table",
    ),
    "report.show": (
        "ablation_figure",
        "batching_figure",
        "clock_figure",
        "concurrency_figure",
        "cross_check_table",
        "equal_load_figure",
        "environment_table",
        "flags_table",
        "kv_capacity_figure",
        "levels_table",
        "littles_law_figure",
        "memory_figure",
        "memory_table",
        "number_line_figure",
        "objective_figure",
        "rate_figure",
        "resources_table",
        "roofline_figure",
        "saturation_figure",
        "throughput_figure",
        "tpot_figure",
        "worth_figure",
    ),
    "results.run_folder": ("LevelResult", "Run", "open_run"),
    "server.command": ("printable_command",),
    "config.trace": ("Trace", "arrival_times", "fixed_length", "from_file", "sharegpt_like"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = list(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
