"""Triton kernels: what the torch code beside their callers does in many steps, in one."""
