"""The Mamba model."""
