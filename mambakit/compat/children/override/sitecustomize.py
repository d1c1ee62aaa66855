"""For processes of `mambakit run`: mambakit's come first."""

from importlib.util import find_spec

if find_spec("mambakit") is not None:  # another Python than the one of `mambakit run` may not have it
    from mambakit.compat.children import start

    start(override=True)
