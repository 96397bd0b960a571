"""Who executes a plan: kernels, fused operations of torch, or plain torch operations."""
