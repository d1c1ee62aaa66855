"""RMSNorm with the residual addition fused."""
