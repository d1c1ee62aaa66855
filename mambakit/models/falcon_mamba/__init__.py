"""The FalconMamba model."""
