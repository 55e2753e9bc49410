"""What the doctor says that a machine can train."""

import pytest

from rwkv_rlhf.training.verdict import ROOM, SHAPES, STORAGES, Machine, verdict

GIB = 1 << 30


def test_a_large_model_is_as_much_as_its_layers():
    """If this breaks, the doctor promises a model that a dry run of the same machine refuses."""
    machine = Machine(GIB, "fp32", gpu=False)
    for stored, _ in STORAGES:
        whole, sum_of_layers = (of(6, 256, stored) for of in (machine.need_of, machine.need_by_layer))
        assert abs(whole.memory - sum_of_layers.memory) < 0.001 * whole.memory
        assert whole.operations == sum_of_layers.operations


@pytest.mark.parametrize("gib", [0.1, 2, 12, 24, 60, 1000])
def test_the_largest_is_the_last_that_fits(gib):
    """If this breaks, somebody with a large machine is told to train a small model, or one that does not fit."""
    machine = Machine(int(gib * GIB), "bf16", gpu=True)
    fitting = []
    for layers, width in SHAPES:
        stored = [name for name, _ in STORAGES if machine.need_by_layer(layers, width, name).memory <= ROOM * gib * GIB]
        fitting += [(f"L{layers}-D{width}", stored[0])] if stored else []
    found = machine.largest()
    assert [(found.shape, found.stored)] == fitting[-1:] if found else not fitting


def test_the_sentence():
    """If this breaks, somebody is told to train what does not fit, or at a speed that comes from nowhere."""
    tiny = verdict(GIB // 8, "fp32", gpu=False, rate=lambda: 1e9)
    assert tiny == "use --precision fp32; L12-D768 with LoRA does not fit in rows of 1024 tokens"
    found = verdict(3 * GIB, "fp32", gpu=False, rate=lambda: 811_597_824e2)
    assert (
        found.startswith("use --precision fp32; L") and "; by the rate of products L12-D768 about 100 tokens/s" in found
    )
