"""Tasks by which a model is judged: lm-evaluation-harness, and RWKV's own measure of LAMBADA."""
