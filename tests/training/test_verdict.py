"""What the doctor says that a machine can train."""

from rwkv_rlhf.training.verdict import need_by_layer, need_of, verdict

GIB = 1 << 30


def test_a_large_model_is_as_much_as_its_layers():
    """If this breaks, the doctor promises a model that a dry run of the same machine refuses."""
    for words in (("--quant", "0"), ("--quant", "1", "--quant_mode", "nf4")):
        whole, sum_of_layers = (of(6, 256, words, "fp32", gpu=False) for of in (need_of, need_by_layer))
        assert abs(whole.memory - sum_of_layers.memory) < 0.001 * whole.memory
        assert whole.operations == sum_of_layers.operations


def test_the_sentence():
    """If this breaks, somebody is told to train what does not fit, or at a speed that comes from nowhere."""
    tiny = verdict(GIB // 8, "fp32", gpu=False, rate=lambda: 1e9)
    assert tiny == "use --precision fp32; L12-D768 with LoRA does not fit in rows of 1024 tokens"
    found = verdict(3 * GIB, "fp32", gpu=False, rate=lambda: 811_597_824e2)
    assert (
        found.startswith("use --precision fp32; L") and "; by the rate of products L12-D768 about 100 tokens/s" in found
    )
