"""What `fp8lab serve`, `status`, `stop` and `profiles` do, which read no run: without the imports of what does.

A function each, as in `commands.py`.
"""

import time

from .config.profile import rate_name
from .config.profile_file import profile_names, read_profile
from .config.this_machine import load_profile, profile_name
from .errors import Fp8labError
from .server import orphans
from .server.command import printable_command
from .server.launch import start_server
from .system import gpu


def serve(args) -> None:
    if args.print_command:
        # A command can be shown for a card that is not here.
        name = "h100-80gb" if args.profile == "auto" and not gpu.gpu_names() else profile_name(args.profile)
        print(printable_command(read_profile(name), args.variant, args.port or 8000))
        return
    with start_server(load_profile(args.profile), args.variant, port=args.port) as server:
        print(server)
        print(f"\nmodel name  {server.model}\nlog         {server.log_path}")
        print("API key     in the environment variable VLLM_API_KEY of the server's processes; --show-key prints it")
        if args.show_key:
            print(f"            {server.api_key}")
        print("Ctrl-C stops the server.", flush=True)
        while server.alive:
            time.sleep(0.5)
        raise Fp8labError(f"the server ended by itself; see {server.log_path}")


def profiles(args) -> None:
    if not args.name:
        names = profile_names()
        wide = max(map(len, names)) + 2
        for name in names:
            print(f"{name:<{wide}}{read_profile(name).title}")
        return
    profile = read_profile(profile_name(args.name))
    wide = max(map(len, profile.variants)) + 2
    print(f"{profile.name}: {profile.title}\n\nvariants")
    for name, one in profile.variants.items():
        variables = " ".join(f"{key}={value}" for key, value in one.env.items())
        print(f"  {name:<{wide}}{' '.join(filter(None, (variables, *one.flags)))}")
    print(f"\nshared flags\n  {' '.join(profile.server.flags)}")
    for protocol, levels in profile.protocols.items():
        print(f"\nprotocol {protocol!r}")
        for level in levels:
            at = rate_name(level.rate)
            print(f"  {level.variant:<{wide}}{at:<14}{level.requests} requests, repeat {level.repeat}")


def status(_args) -> None:
    found = orphans.servers()
    if not found:
        print("no server of fp8lab is running")
    for server in found:
        owner, watchdog = f"in use by pid {server.owner_pid}", ", its watchdog is gone"
        if not server.owned:
            owner, watchdog = f"LEFT OVER: its owner {server.owner_pid} is gone", ", its watchdog too"
        owner += "" if server.watched else watchdog
        held = f"{(time.time() - server.started) / 60:.0f} min, {server.memory_gib:.1f} GiB"
        pids = ", ".join(map(str, server.pids))
        print(f"{server.variant} ({server.profile}), port {server.port}, {held}, {owner}; pids {pids}")
    if (used := gpu.memory_used_gib()) is not None:
        print(f"GPU memory in use: {used:.1f} GiB")


def stop(args) -> None:
    found = [server for server in orphans.servers() if args.all or not server.owned]
    for server in found:
        orphans.stop(server)
        print(f"ended {server.variant} ({server.profile}), {len(server.pids)} processes")
    if not found:
        print("nothing to end" if args.all else "nothing is left over (servers in use are kept; --all ends them too)")
