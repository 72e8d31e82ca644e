"""A run that is only read has no server; this stands in its place."""

from .errors import BadInput
from .profiles import Profile
from .runs import Run
from .server.launch import ServerInfo
from .tables import Table


class RecordedServer:
    """Stands where a server would when a run is only read: nothing is started, nothing can be loaded."""

    def __init__(self, profile: Profile, variant: str, run: Run):
        profile.variant_flags(variant)
        self.profile, self.variant, self.run = profile, variant, run
        held = [s["server"] for s in run.summaries().values() if s["level"]["variant"] == variant]
        if not held:
            raise BadInput(f"recorded run {run.path.name} holds no level of variant {variant!r}")
        self.info = ServerInfo(**held[0])

    def stop(self) -> None:
        """Nothing runs, nothing ends."""

    def __enter__(self) -> "RecordedServer":
        return self

    def __exit__(self, *_exc) -> None:
        self.stop()

    def _table(self) -> Table:
        rows = [("state", "recorded: no server is running"), *self.info.rows()]
        emulated = " (EMULATED GPU)" if self.run.emulated else ""
        return Table(
            f"vLLM server, variant {self.variant}, run {self.run.path.name}{emulated}", ("", "as recorded"), rows
        )

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()
