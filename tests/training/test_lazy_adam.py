"""Tables by token learn by the rows that occur, as torch's Adam has it, and nothing else as large as one is made."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rwkv_rlhf.checkpoints.loading import BuildOptions, build_model
from rwkv_rlhf.checkpoints.tensor_tree import read_tree, write_tree
from rwkv_rlhf.distributed import ranks
from rwkv_rlhf.layers.linear import TokenTable
from rwkv_rlhf.plan import is_token_table, make_plan
from rwkv_rlhf.scoring.infinite_context import ChunkedRows, run_in_chunks
from rwkv_rlhf.settings.config import Config
from rwkv_rlhf.settings.optimizers import OPTIMIZERS
from rwkv_rlhf.training.memory import memory_by_part, row_bytes
from rwkv_rlhf.training.optimizers import make_optimizer, parameter_groups, state_of
from rwkv_rlhf.training.strategies import gradient_norm, gradient_numbers, load_rank_state, rank_state
from rwkv_rlhf.training.strategies.ddp import average_rows
from tests.support.models import build, random_tensors

V, C, RATE, BETAS = 11, 5, 0.02, (0.8, 0.95)
NAME = "blocks.0.ffn.s_emb.weight"
ABSENT = [(3, 3, 0), (5, 0, 9), (9, 9, 9), (0, 3, 10), (5, 10, 1)]  # 2, 4, 6, 7 and 8 never come
ALWAYS = [(*range(V), *step) for step in ABSENT]


class Task:
    """A small model of plain torch operations over a table, its gradient sparse or dense."""

    def __init__(self, sparse, dtype=torch.float64):
        generator = torch.Generator().manual_seed(4)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
        self.table = nn.Parameter(draw(V, C))
        self.target, self.sparse = draw(V, C), sparse

    def loss(self, tokens):
        tokens = torch.tensor(tokens)
        rows = nn.functional.embedding(tokens, self.table, sparse=self.sparse)
        return (torch.tanh(rows) - self.target[tokens]).square().sum()

    def learn(self, optimizer, steps):
        for tokens in steps:
            optimizer.zero_grad()
            self.loss(tokens).backward()
            optimizer.step()
        return self.table.detach()


def lazy(table, eps=1e-8, **config):
    """The optimizer that a run would make of one table."""
    group = {"params": [table], "names": [NAME], "lr": RATE, "weight_decay": 0.0}
    return make_optimizer(Config(beta1=BETAS[0], beta2=BETAS[1], adam_eps=eps, **config), [group])


def test_where_every_token_occurs_it_is_adam():
    """If this breaks, rows do not learn by the rule that the rest of the model learns by."""
    one, two = Task(sparse=True), Task(sparse=False)
    found = one.learn(lazy(one.table), ALWAYS)
    torch.testing.assert_close(found, two.learn(torch.optim.Adam([two.table], RATE, BETAS, 1e-8), ALWAYS))


def test_where_some_are_absent_it_is_torchs_sparse_adam():
    """If this breaks, a row that comes and goes learns otherwise than other programs' lazy Adam lets it. Only the place
    of epsilon differs there, which is next to nothing here. Rows that never come keep their bits."""
    one, two = Task(sparse=True), Task(sparse=True)
    first = one.table.detach().clone()
    found = one.learn(lazy(one.table, 1e-14), ABSENT)
    torch.testing.assert_close(found, two.learn(torch.optim.SparseAdam([two.table], RATE, BETAS, 1e-14), ABSENT))
    came = sorted({token for step in ABSENT for token in step})
    never = [token for token in range(V) if token not in came]
    assert torch.equal(found[never], first[never]) and bool((found[came] != first[came]).any(1).all())


def test_micro_batches_add_up_and_moments_are_of_rows_that_came():
    """If this breaks, accumulation changes what is learnt, or gradients and moments grow to the size of the table."""
    one, two = Task(sparse=True), Task(sparse=True)
    optimizer, other = lazy(one.table), lazy(two.table)
    for tokens in ABSENT:
        for token in tokens:
            one.loss([token]).backward()
        assert one.table.grad.is_coalesced() and one.table.grad.values().shape == (len(set(tokens)), C)
        two.loss(tokens).backward()
        torch.testing.assert_close(one.table.grad.to_dense(), two.table.grad.to_dense())
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    torch.testing.assert_close(one.table, two.table)
    state = optimizer.state[one.table]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (len({t for step in ABSENT for t in step}), C)
    assert {name for name, value in state.items() if isinstance(value, torch.Tensor) and len(value) == V} == {"place"}


def test_a_stopped_table_goes_on_with_the_same_bits(tmp_path):
    """If this breaks, a resumed run ends elsewhere than one that was not stopped, or has the moments of another one."""
    one = Task(sparse=True, dtype=torch.float32)
    optimizer = lazy(one.table)
    one.learn(optimizer, ABSENT[:2])
    state = rank_state(trainer_with(optimizer))
    write_tree(state, tmp_path / "state")
    again = copy.deepcopy(one)
    wanted = one.learn(optimizer, ABSENT[2:])
    resumed = lazy(again.table)
    load_rank_state(trainer_with(resumed), read_tree(tmp_path / "state"))
    assert torch.equal(again.learn(resumed, ABSENT[2:]), wanted)
    state["0"]["place"] = state["0"]["place"][1:]
    with pytest.raises(ValueError, match="it is of another run"):
        load_rank_state(trainer_with(resumed), state)


def trainer_with(optimizer):
    """As much of Lightning's trainer as the optimizer's state asks for."""
    return SimpleNamespace(optimizers=[optimizer], strategy=None)


@pytest.mark.parametrize("here", [(3, 0, 3), ()])
@pytest.mark.parametrize("there", [(0, 9), ()])
def test_ranks_have_the_mean_of_their_rows(monkeypatch, here, there):
    """If this breaks, a run on two devices learns the rows of one of them, or dies where a rank has no token at all.
    Real processes: tests/runs/test_ranks.py."""
    one, other, both = Task(sparse=True), Task(sparse=True), Task(sparse=True)
    for task, tokens in ((one, here), (other, there), (both, (*here, *there))):
        if tokens:
            task.loss(tokens).backward()
    sent = other.table.grad.coalesce() if there else None
    parts = iter(
        [sent.indices()[0], sent.values()] if there else [torch.empty(0, dtype=torch.int64), torch.empty(0, C)]
    )
    monkeypatch.setattr(ranks, "all_gather_rows", lambda rows: [rows, next(parts).to(rows.dtype)])
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    average_rows([one.table])
    if not (here or there):
        assert one.table.grad is None
        return
    assert one.table.grad.is_coalesced()
    torch.testing.assert_close(one.table.grad.to_dense(), both.table.grad.to_dense() / 2)


TOKENS = torch.tensor([[5, 0, 17, 5, 5, 42, 17, 63, 0]])


def deep_embed(dtype=torch.float64, **options):
    """A two-layer RWKV-7a of 64 tokens in which all trains, its tables too, and its plan."""
    plan = make_plan("full", 2, lr_init=RATE, lr_final=RATE, weight_decay=0.3)
    plan = dataclasses.replace(plan, tables=True)
    return *build_model(random_tensors("x070a", 2, 64, 64, 32), BuildOptions(dtype, plan=plan, **options)), plan


@pytest.mark.parametrize("way", ["plain", "recomputed", "chunks"])
def test_a_row_s_gradient_is_the_dense_one(way):
    """If this breaks, a token that occurs twice, in another chunk or a recomputed block loses part of its gradient."""
    model, _, _ = deep_embed(grad_cp=way == "recomputed")
    plain = build(random_tensors("x070a", 2, 64, 64, 32), torch.float64)
    for module in plain.modules():
        if isinstance(module, TokenTable):
            module.row_gradient = False
    weights = torch.randn(TOKENS.shape[1], 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (plain(TOKENS)[0][0] * weights).sum().backward()
    if way == "chunks":
        rows = ChunkedRows(2)
        rows.add(TOKENS[0], torch.tensor([0, TOKENS.shape[1]]))
        hidden = run_in_chunks(model, rows, lambda hidden, span: {"hidden": hidden})["hidden"]
    else:
        hidden = model(TOKENS)[0][0]
    (hidden * weights).sum().backward()
    dense = {name: p for name, p in plain.named_parameters() if p.grad is not None}
    learnt = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert learnt.keys() == dense.keys() and sum(map(is_token_table, learnt)) == 2
    for name, p in learnt.items():
        assert p.grad.is_sparse == is_token_table(name)
        torch.testing.assert_close(p.grad.to_dense(), dense[name].grad, rtol=1e-9, atol=1e-10)
        if p.grad.is_sparse:
            rows = p.grad.coalesce().indices()[0].tolist()
            assert rows == sorted(set(TOKENS[0].tolist())) and dense[name].grad[rows].abs().sum(1).min() > 0


@pytest.mark.parametrize("optim", [name for name, facts in OPTIMIZERS.items() if not facts.host])
def test_every_optimizer_has_the_lazy_one_beside_it(optim):
    """If this breaks, --train_tables 1 with another --optim dies, leaves tensors out, or clips by a norm that is not
    that of the whole gradient; or a dry run promises too little memory."""
    if package := OPTIMIZERS[optim].needs:
        pytest.importorskip(package)
    model, _, plan = deep_embed(torch.float32)
    groups = parameter_groups(model, plan, "x070a", layerwise=True)
    optimizer = make_optimizer(Config(optim=optim), groups)
    named = {id(p): name for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        (model.head(model(TOKENS)[0])).square().mean().backward()
        dense = [p.grad.to_dense() for group in optimizer.param_groups for p in group["params"]]
        torch.testing.assert_close(gradient_norm(None, optimizer), torch.nn.utils.get_total_norm(dense))
        assert sum(len(numbers) != 64 for numbers in gradient_numbers(optimizer) if numbers.shape[-1] == 32**2) == 2
        optimizer.step()
        optimizer.zero_grad()
    decay = {named[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    tables = {name for name in before if is_token_table(name)}
    assert decay.keys() == before.keys() and {decay[name] for name in tables} == {0.0} and max(decay.values()) == 0.3
    came, never = sorted(set(TOKENS[0].tolist())), sorted(set(range(64)) - set(TOKENS[0].tolist()))
    for name, p in model.named_parameters():
        if name in tables:
            assert torch.equal(p[never], before[name][never]) and bool((p[came] != before[name][came]).any(1).all())
        else:
            assert not torch.equal(p, before[name]) or not before[name].any(), name
    size = state_of(optim, model)
    assert (
        size.tables == sum(before[name].numel() for name in tables) and "lazy Adam for 131,072 in tables" in size.line()
    )
    held = [x for name, p in model.named_parameters() if name in tables for x in optimizer.state[p].values()]
    held = [x.nbytes for x in held if isinstance(x, torch.Tensor) and x.dim() == 2]
    assert sum(held) == 2 * 2 * 4 * len(came) * 32**2 < 8 * size.tables


def test_the_plan_counts_rows_not_tables():
    """If this breaks, a run that fits is said not to: the gradient of a table is that of its tokens."""
    model, report, _ = deep_embed(torch.float32)
    assert row_bytes(model, 9) == 2 * 9 * (4 * 32**2 + 8) and row_bytes(model, 9999) == 2 * 64 * (4 * 32**2 + 8)
    others = sum(p.numel() for name, p in model.named_parameters() if not is_token_table(name))
    words = Config(loss="sft", data_file="D", precision="fp32", accumulate_grad_batches=3)
    assert memory_by_part(words, model, 9, gpu=False).device["gradients"] == 4 * others + row_bytes(model, 27)
    assert "2 tables of DeepEmbed (s_emb) train" in "\n".join(report.lines())
