"""Built on models: pipelines, streaming text, scoring."""
