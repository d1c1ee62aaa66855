"""Code written for mamba_ssm and causal_conv1d, over mambakit's ops: `mambakit.provide`.

    surface.py     what is given: modules, names, and each one's home here
    finder.py      the finders on sys.meta_path; installed.py: what is there without them, and whether it serves
    provision.py   `provide`, and the table of what comes from where
    replaced.py    what code sets on those modules by name, which layers and models call
    children/      how child processes of `mambakit run` come by it

and the functions and modules themselves, over `mambakit.ops` and `mambakit.modules` alone. Importing this package
imports no torch.
"""

from mambakit.compat.provision import Row, provide, rows

__all__ = ["Row", "provide", "rows"]
