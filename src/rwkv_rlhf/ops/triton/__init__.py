"""Kernels in Triton: the fast path on a GPU, which needs no compiler on the machine.

`kernels.py` launches them; the other files hold what runs on the device. With TRITON_INTERPRET=1 in the environment of
the process they run on a CPU, slowly, which is how their arithmetic is tested without a GPU. Nothing here is imported
unless a backend of that name is asked for, because importing Triton takes a second.
"""
