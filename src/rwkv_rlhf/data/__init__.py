"""Files -> examples -> packed batches; `settings/formats.py` says what can be read, `opening.py` opens it.

Nothing is imported here, so that what needs no PyTorch starts without it.
"""
