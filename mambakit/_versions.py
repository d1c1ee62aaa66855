"""Which releases of torch and transformers each layer was tested with, checked by what is installed; nothing is
imported.

`mambakit.ops`, `modules`, `nn` and `compat` need torch alone. All else (models, generation, evaluation, training,
serving, the command line) needs transformers, too, which the extra ``hf`` brings.
"""

from __future__ import annotations

import functools
import re
import warnings
from importlib import metadata

from mambakit.errors import RequirementError

Release = tuple[int, int]

# Layer -> package -> the oldest and the newest minor release tested. pyproject.toml asks for the same.
TESTED: dict[str, dict[str, tuple[Release, Release]]] = {
    "ops": {"torch": ((2, 4), (2, 13))},
    "models": {"transformers": ((5, 17), (5, 24)), "torch": ((2, 9), (2, 13))},
}
_NEEDED_BY = {
    "ops": "mambakit",
    "models": "mambakit's models, generation, training, serving and commands (all but mambakit.ops, modules, nn "
    "and compat)",
}


def check_ops() -> None:
    """The check at ``import mambakit``: a torch that is older than any layer takes ends it.

    Raises:
        RequirementError: an older torch. Where torch is missing, the import of torch says so.
    """
    _check("ops", stacklevel=4)


@functools.cache
def check_models() -> None:
    """The check at the first use of a name that needs transformers.

    Raises:
        RequirementError: transformers is missing, or torch or transformers is too old for the models.
    """
    _check("models", stacklevel=4)


def _check(layer: str, stacklevel: int) -> None:
    for package, (oldest, newest) in TESTED[layer].items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package == "transformers":
                raise RequirementError(
                    f'{_NEEDED_BY[layer]} need transformers, which is not installed: pip install "mambakit[hf]"'
                ) from None
            continue
        found = re.match(r"(\d+)\.(\d+)", version)
        if found is None:
            continue
        minor = (int(found[1]), int(found[2]))
        first, last = (".".join(map(str, release)) for release in (oldest, newest))
        beyond = f"{newest[0]}.{newest[1] + 1}"
        if minor < oldest:
            need = "needs" if layer == "ops" else "need"
            raise RequirementError(
                f"{_NEEDED_BY[layer]} {need} {package} {first} or newer and found {version}: "
                f'pip install "{package}>={first},<{beyond}"'
            )
        if minor > newest and (layer, package) != ("models", "torch"):  # of a newer torch the import has told
            warnings.warn(
                f"mambakit was tested with {package} {first} to {last} and found {version}, with which something may "
                f'fail: pip install "{package}<{beyond}"',
                stacklevel=stacklevel,
            )
