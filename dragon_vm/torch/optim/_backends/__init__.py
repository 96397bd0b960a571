"""Who executes a step: kernels, fused CPU operations or plain torch operations; and how kernels are launched."""
