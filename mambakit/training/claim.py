"""One process at a time trains in a folder: a lock, held from before its first check to the end of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mambakit.training.config import TrainConfig
from mambakit.training.distributed import ProcessMesh
from mambakit.training.folder import RunFolder

_LOCK = "run.lock"


@contextlib.contextmanager
def claim(config: TrainConfig, mesh: ProcessMesh) -> Iterator[RunFolder | None]:
    """The folder of a run, held by this process alone until the end; None in all processes but the first.

    The lock is the operating system's, which releases it when the process ends, even by a crash.

    Raises:
        ValueError: another process holds it, or `RunFolder` refuses; in every process.
    """
    with contextlib.ExitStack() as stack:
        folder: RunFolder | None = None
        refusal: Exception | None = None
        if mesh.first:
            try:
                folder = stack.enter_context(_locked(config))
            except (ValueError, OSError) as error:
                refusal = error
        refusal = mesh.share(refusal)
        if refusal is not None:
            raise refusal
        yield folder


@contextlib.contextmanager
def _locked(config: TrainConfig) -> Iterator[RunFolder]:
    import filelock

    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {out}, which is a file; choose another out")
    RunFolder(config)  # what is refused leaves nothing behind
    made = [place for place in (out, *out.parents) if not place.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(out / _LOCK, is_singleton=False).acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(f"another process is training in {out}; wait until it ends, or choose another out") from error
    with lock:
        try:
            yield RunFolder(config)
        except BaseException:
            with contextlib.suppress(OSError):  # a folder that others have put something in stays
                if made and [file.name for file in out.iterdir()] == [_LOCK]:  # what is refused later, neither
                    (out / _LOCK).unlink()
                    for folder in made:
                        folder.rmdir()
            raise
