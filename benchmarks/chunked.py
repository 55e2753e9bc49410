"""The recurrences in matrix products over chunks of tokens, in plain PyTorch: what a kernel has to beat.

From empty states; T a multiple of the chunk's length. No exponent is positive except WKV-7's, whose decay is bounded.

B batch, T tokens, H heads, N head size, C = H * N channels, L tokens per chunk
"""

import math

import torch
from torch import Tensor

LENGTH, BLOCK = 64, 16  # of a chunk of WKV-5 and 6, and of its blocks, which are compared token by token
LENGTH4, LENGTH7 = 16, 32


def split(x: Tensor, length: int) -> Tensor:
    """(B, T, H, N) -> (B, H, chunks, L, N)"""
    batch, tokens, heads, size = x.shape
    return x.view(batch, tokens // length, length, heads, size).permute(0, 3, 1, 2, 4)


def join(x: Tensor) -> Tensor:
    """(B, H, chunks, L, N) -> (B, T, H, N)"""
    batch, heads, chunks, length, size = x.shape
    return x.permute(0, 2, 3, 1, 4).reshape(batch, chunks * length, heads, size)


def chunked4(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """WKV-4: every pair of tokens of a chunk by its own exponential; sums are carried from chunk to chunk."""
    batch, tokens, channels = k.shape
    d = -torch.exp(w)
    at = torch.arange(LENGTH4, device=k.device)
    k, v = (x.view(batch, -1, LENGTH4, channels) for x in (k, v))  # (B, chunks, L, C)
    before = (at[:, None] > at)[..., None]
    pair = (k[:, :, None] + d * (at[:, None] - 1 - at).clamp_min(0)[..., None]).masked_fill(~before, -math.inf)
    pair = torch.where((at[:, None] == at)[..., None], (u + k)[:, :, None], pair)  # (B, chunks, L, L, C)
    to_end = k + d * (LENGTH4 - 1 - at)[:, None]
    top_end = to_end.amax(2).detach()
    weight = (to_end - top_end[:, :, None]).exp()
    sums = torch.stack([(weight * v).sum(2), weight.sum(2)])  # (2, B, chunks, C)
    state, top, states, tops = k.new_zeros(2, batch, channels), k.new_full((batch, channels), -1e38), [], []
    for c in range(tokens // LENGTH4):
        states.append(state)
        tops.append(top)
        new = torch.maximum(top + LENGTH4 * d, top_end[:, c]).detach()
        state = state * (top + LENGTH4 * d - new).exp() + sums[:, :, c] * (top_end[:, c] - new).exp()
        top = new
    carried = torch.stack(tops, 1)[:, :, None] + d * at[:, None]  # (B, chunks, L, C)
    highest = torch.maximum(carried, pair.amax(3)).detach()
    near, far = (pair - highest[:, :, :, None]).exp(), (carried - highest).exp()
    upper, lower = (x[:, :, None] * far for x in torch.stack(states, 2))
    y = (upper + torch.einsum("bntsc,bnsc->bntc", near, v)) / (lower + near.sum(3))
    return y.view(batch, tokens, channels)


def chunked6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """WKV-6: blocks of a chunk meet through the decay at the later one's edge, tokens of a block directly."""
    r, k, v, log_decay = (split(x, LENGTH) for x in (r, k, v, -torch.exp(w)))
    g = log_decay.cumsum(-2)  # through the token; e: up to it
    e = g - log_decay
    later = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=r.device).tril(-1)[..., None]
    rows = []
    for begin in range(0, LENGTH, BLOCK):
        here = slice(begin, begin + BLOCK)
        edge = e[..., begin : begin + 1, :]
        before = k[..., :begin, :] * (edge - g[..., :begin, :]).exp()
        gap = (e[..., here, None, :] - g[..., None, here, :]).masked_fill(~later, -math.inf)
        own = torch.einsum("...tj,...sj,...tsj->...ts", r[..., here, :], k[..., here, :], gap.exp())
        row = torch.cat([(r[..., here, :] * (e[..., here, :] - edge).exp()) @ before.mT, own], -1)
        rows.append(torch.nn.functional.pad(row, (0, LENGTH - begin - BLOCK)))
    A = torch.cat(rows, -2)
    local = A @ v + (r * u[:, None, None] * k).sum(-1, keepdim=True) * v
    r_in, k_end, decay = r * e.exp(), k * (g[..., -1:, :] - g).exp(), g[..., -1:, :].exp()
    state, states = r.new_zeros(*r.shape[:2], r.shape[-1], r.shape[-1]), []  # (B, H, N_v, N_k)
    for c in range(r.shape[2]):
        states.append(state)
        state = state * decay[:, :, c] + v[:, :, c].mT @ k_end[:, :, c]
    return join(r_in @ torch.stack(states, 2).mT + local)


def chunked5(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """WKV-5.2 as WKV-6 with the same decay at every token."""
    return chunked6(r, k, v, w.expand(r.shape), u)


def chunked7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """WKV-7 in the WY form.

    With g the cumulative log decay in a chunk and e that of the token before: sa of a chunk is u = U0 + W S^T, where
    (I - Aab) [U0, W] = [Aak v, a e^e]; A.. are the masked products of r or a with k or b, decayed in between.
    """
    size = r.shape[-1]
    r, w, k, v, a, b = (split(x, LENGTH7) for x in (r, w, k, v, a, b))
    log_decay = -math.exp(-0.5) * torch.sigmoid(w)
    g = log_decay.cumsum(-2)
    end = g[..., -1:, :]
    r_in, a_in = r * g.exp(), a * (g - log_decay).exp()
    k_out, b_out = k * (-g).exp(), b * (-g).exp()
    k_end, b_end = k * (end - g).exp(), b * (end - g).exp()
    A_qk, A_qb = (r_in @ k_out.mT).tril(), (r_in @ b_out.mT).tril()
    A_ak, A_ab = (a_in @ k_out.mT).tril(-1), (a_in @ b_out.mT).tril(-1)
    eye = torch.eye(LENGTH7, dtype=r.dtype, device=r.device)
    solved = torch.linalg.solve_triangular(eye - A_ab, torch.cat([A_ak @ v, a_in], -1), upper=False)
    U0, W = solved.split(size, dim=-1)
    local, decay = A_qk @ v, end.exp()
    state = r.new_zeros(*r.shape[:2], size, size)  # (B, H, N_v, N_k)
    ys = []
    for c in range(r.shape[2]):
        u = U0[:, :, c] + W[:, :, c] @ state.mT
        ys.append(r_in[:, :, c] @ state.mT + local[:, :, c] + A_qb[:, :, c] @ u)
        state = state * decay[:, :, c] + v[:, :, c].mT @ k_end[:, :, c] + u.mT @ b_end[:, :, c]
    return join(torch.stack(ys, 2))


# op -> (name, function of the op's inputs that returns y)
CHUNKED = {
    "wkv4": (f"chunked PyTorch, L={LENGTH4}", chunked4),
    "wkv5": (f"chunked PyTorch, L={LENGTH}", chunked5),
    "wkv6": (f"chunked PyTorch, L={LENGTH}", chunked6),
    "wkv7": (f"chunked PyTorch, L={LENGTH7}", chunked7),
}
