"""fp8lab: what does FP8 really buy when vLLM serves a model on a Hopper GPU?

    import fp8lab as lab

    profile = lab.load_profile("auto")
    with lab.serve(profile, "bf16") as server:
        bf16 = lab.load_test(server, rate=50, requests=1000)

Names are imported when they are first used, so that `import fp8lab` takes no time.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "config.profile": ("Level", "Profile", "Variant"),
    "config.profile_file": ("profile_names",),
    "config.this_machine": ("load_profile",),
    "config.trace": ("Trace", "arrival_times", "fixed_length", "from_file", "sharegpt_like"),
    "errors": (
        "BadInput", "Fp8labError", "InUse", "LevelFailed", "NotWritten", "RunDamaged", "RunMismatch", "ServerFailed",
    ),
    "experiment.anatomy": ("measure_anatomy",),
    "experiment.max_rate": ("find_max_rate",),
    "experiment.predict": ("drawing", "highest_rate", "predict", "predict_rates", "step_models"),
    "experiment.quality": (
        "QualityTask", "check_weights", "checkpoint_folder", "measure_quality", "quality_profile", "read_text",
    ),
    "experiment.speed": ("load_test", "measure", "plan_table", "serve", "start_server", "trace_for", "warm_up"),
    "metrics.slo": ("MLPERF_INTERACTIVE", "MLPERF_SERVER", "SLO", "required_requests"),
    "metrics.summary": ("Summary",),
    "report.claims": ("claims_across", "claims_table", "conclusion", "judge", "write_claims"),
    "report.anatomy": ("host_table", "kernels_table", "step_figure", "steps_table"),
    "report.comparison": (
        "ablation_figure", "ablation_table", "cards_table", "checkpoints_table", "equal_load_figure", "equal_load_table",
        "recipes_figure", "recipes_table", "unsealing_figure", "unsealing_table", "worth_figure", "worth_table",
    ),
    "report.levels": (
        "attainment_table", "capacity_plan", "client_table", "concurrency_figure", "cross_check_table",
        "environment_table", "flags_table", "latency_table", "levels_table", "objective_figure", "rate_figure",
        "saturation_figure", "slo_table", "throughput_figure", "throughputs_table", "tpot_figure", "validity_table",
    ),
    "report.machine": (
        "batching_figure", "bottlenecks_table", "clock_figure", "fit_table", "kv_table",
        "littles_law_figure", "memory_figure", "memory_table", "paging_table", "resources_table", "roofline_figure",
        "roofline_table",
    ),
    "report.notebooks": ("check_injected",),
    "report.predicted": (
        "cards_plan_table", "foretold_table", "models_table", "predicted_figure", "predicted_table", "what_if_figure", "what_if_table",
    ),
    "report.quality": (
        "answers_table", "asked_table", "divergence_figure", "formats_figure", "formats_table", "kv_rounding_table",
        "number_line_figure", "parting_figure", "published_table", "quality_table", "weights_table",
    ),
    "results.evidence": ("levels",),
    "results.run_folder": ("LevelResult", "Run", "open_run"),
    "server.command": ("printable_command",),
}  # fmt: skip
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
