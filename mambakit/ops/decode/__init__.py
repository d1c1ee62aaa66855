"""One token through a whole model on a GPU. (On a CPU: `mambakit.ops.decode.cpu`.)"""
