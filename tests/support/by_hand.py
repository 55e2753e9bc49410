"""Log-probabilities of answers the long way: one sequence at a time, in float64, over the whole vocabulary."""

import torch

from rwkv_rlhf.checkpoints.tensor_files import read_tensors
from tests.support.models import build


@torch.no_grad()
def answer_logps(pairs, *files):
    """(n, 2) summed log p of the chosen and rejected answers; each file's tensors replace those of the file before."""
    tensors = {name: tensor.double() for file in files for name, tensor in read_tensors(file).items()}
    model = build(tensors, torch.float64, wkv_backend="naive").eval()

    def of(prompt, answer):
        row = torch.tensor([*prompt, *answer])
        hidden, _ = model(row[None, :-1])
        logp = model.head(hidden)[0].log_softmax(-1)
        return logp[len(prompt) - 1 :].gather(1, row[len(prompt) :, None]).sum()

    return torch.stack([torch.stack([of(p.prompt, p.chosen), of(p.prompt, p.reject)]) for p in pairs])
