"""Models for transformers' interfaces: configurations, Mamba and FalconMamba, checkpoints, Auto classes."""
