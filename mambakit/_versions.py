"""The check at import that the installed torch and transformers are releases that mambakit was tested with."""

from __future__ import annotations

import re
import warnings
from importlib import metadata

# The oldest and newest minor release tested; pyproject.toml asks for the same, and CI runs both ends.
TESTED = {"torch": ((2, 9), (2, 13)), "transformers": ((5, 17), (5, 24))}


def check_versions() -> None:
    """Warn of a release that is newer than those tested; ImportError for an older one. Nothing is imported.

    A missing package is passed over: the module that needs it raises.
    """
    for package, (oldest, newest) in TESTED.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        found = re.match(r"(\d+)\.(\d+)", version)
        if found is None:
            continue
        minor = (int(found[1]), int(found[2]))
        first, last = (".".join(map(str, release)) for release in (oldest, newest))
        beyond = f"{newest[0]}.{newest[1] + 1}"
        if minor < oldest:
            raise ImportError(
                f"mambakit needs {package} {first} or newer and found {version}: "
                f"pip install '{package}>={first},<{beyond}'"
            )
        if minor > newest:
            warnings.warn(
                f"mambakit was tested with {package} {first} to {last} and found {version}, with which something may "
                f"fail: pip install '{package}<{beyond}'",
                stacklevel=3,
            )
