"""What the server of `launch` imports before it forks."""

import mambakit.training.distributed
import mambakit.training.loop  # noqa: F401
