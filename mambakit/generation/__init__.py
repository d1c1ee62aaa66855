"""Built on models: pipelines, streaming text, scoring."""

from mambakit._versions import check_models

check_models()
