"""The flags of each command but `train` and those made of it, a file each: nothing here imports PyTorch.

So --help, --version and a mistyped flag answer at once; the command itself is imported when its flags are right.
"""
