"""The three ops composed of plain PyTorch, for any device and dtype, float64 included.

Same functions as `kernels/triton`. On a CPU the inner loops go to the native library of `kernels/cpu`
where it is loaded and knows the dtype. No [n, d_sae], no [n, k, d] and no [T, T] is ever formed whole:
each function works through its rows in chunks of bounded size.
"""
