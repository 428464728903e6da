"""The definitions of the operators in plain PyTorch: slow, readable, differentiable by autograd.

Every other implementation is tested against these, in float64. `HOPE_REFERENCE=1` makes the public
functions run on them, without the compiled extension.
"""
