"""fp8lab: what does FP8 really buy when vLLM serves a model on a Hopper GPU?

    import fp8lab as lab

    profile = lab.load_profile("auto")
    with lab.serve(profile, "bf16") as server:
        bf16 = lab.load_test(server, rate=50, requests=1000)

Names are imported when they are first used, so that `import fp8lab` takes no time.
"""

import importlib
import sys
import types

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
    "experiment": ("load_test", "measure", "serve", "start_server", "trace_for", "warm_up"),
    "profiles": ("Level", "Profile", "load_profile", "profile_names"),
    "report.claims": ("claims_table", "judge"),
    "report.show": (
        "concurrency_figure",
        "cross_check_table",
        "environment_table",
        "flags_table",
        "levels_table",
        "memory_table",
        "rate_figure",
        "resources_table",
        "throughput_figure",
        "tpot_figure",
    ),
    "runs": ("LevelResult", "Run", "open_run"),
    "traces": ("Trace", "arrival_times", "fixed_length", "from_file", "sharegpt_like"),
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


class _Api(types.ModuleType):
    """`fp8lab.measure` stays the function also after something has imported the package of that name."""

    def __setattr__(self, name: str, value):
        if not (name in _HOME_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Api
