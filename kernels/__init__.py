"""What runs on the hardware: kernels that know tensors and pointers, and nothing of SAEs, autograd or modules."""
