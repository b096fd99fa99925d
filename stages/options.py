"""How and where to run: what every stage is told besides its recipe and its inputs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The shared flags of the command line: flags say where and how, the recipe says what.

    max_steps and max_minutes say where to stop; they are not part of a run's identity.
    """

    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    limit: int | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    overwrite: bool = False
    parallel: str = "ddp"
    workers: int = 0
    on_bad_sample: str = "skip"
    max_bad_fraction: float = 0.01
    quiet: bool = False
    recipe: str | None = None  # as it was named: the file of it must not be lost to --overwrite
    command: tuple[str, ...] = ()
