"""Triton kernels and their launchers: tensors in, tensors out. Known to users as `daam.kernels`; imports nothing of
`daam`.
"""
