"""What runs on the hardware: kernels that know tensors and pointers, and nothing of SAEs, autograd or modules."""

# Imported as csae.kernels alone: a module under two names is two modules. In a checkout the bare name is found too, by
# transformers, which looks for a library of that name. So the bare package is empty, and not an error.
if __name__ != "csae.kernels":
    __path__ = []
