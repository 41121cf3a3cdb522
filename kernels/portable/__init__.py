"""The kernels in plain PyTorch, for any device and dtype, float64 included.

Same functions as `kernels/triton` and `kernels/cpu`. No [n, d_sae], no [n, k, d] and no [T, T] is ever formed whole:
each function works through its rows in chunks of bounded size.
"""
