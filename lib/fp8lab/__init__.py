"""fp8lab: what does FP8 really buy when vLLM serves a model on a Hopper GPU?

    import fp8lab as lab

    profile = lab.load_profile("auto")
    with lab.serve(profile, "bf16") as server:
        bf16 = lab.load_test(server, rate=50, requests=1000)

Names are imported when they are first used, so that `import fp8lab` takes no time.
"""

import importlib

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
    "report.figures.anatomy": ("step_figure",),
    "report.figures.background": ("batching_figure", "memory_figure", "number_line_figure", "roofline_figure"),
    "report.figures.comparison": (
        "ablation_figure", "clock_figure", "concurrency_figure", "equal_load_figure", "kv_capacity_figure",
        "littles_law_figure", "objective_figure", "rate_figure", "saturation_figure", "throughput_figure", "tpot_figure",
        "unsealing_figure", "worth_figure",
    ),
    "report.figures.predicted": ("predicted_figure",),
    "report.figures.quality": ("divergence_figure", "formats_figure", "parting_figure"),
    "report.figures.recipes": ("recipes_figure",),
    "report.notebooks": ("check_injected",),
    "report.tables.anatomy": ("host_table", "kernels_table", "steps_table"),
    "report.tables.cards": ("cards_table",),
    "report.tables.comparison": ("ablation_table", "equal_load_table", "unsealing_table", "worth_table"),
    "report.tables.levels": (
        "attainment_table", "capacity_plan", "client_table", "cross_check_table", "latency_table", "levels_table", "slo_table",
        "throughputs_table", "validity_table",
    ),
    "report.tables.machine": (
        "bottlenecks_table", "environment_table", "fit_table", "flags_table", "kv_table", "memory_table", "paging_table",
        "resources_table", "roofline_table",
    ),
    "report.tables.predicted": ("cards_plan_table", "foretold_table", "models_table", "predicted_table", "what_if_table"),
    "report.tables.quality": (
        "answers_table", "asked_table", "formats_table", "kv_rounding_table", "published_table", "quality_table",
        "weights_table",
    ),
    "report.tables.recipes": ("checkpoints_table", "recipes_table"),
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
