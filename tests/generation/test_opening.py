"""--strategy of the scripts: where a model runs, in what, and how its matrices are stored."""

import pytest

from rwkv_rlhf.checkpoints.loading import BuildOptions, as_trained, load_model
from rwkv_rlhf.generation.opening import open_model, storage_of
from rwkv_rlhf.layers.placing import matrices


@pytest.mark.parametrize("store", ["int8", "nf4"])
def test_a_packed_strategy_is_the_storage_of_training(store, base_model, vocab_file):
    """If this breaks, a model that is talked to in int8 is another one than the one that was trained over int8."""
    if store == "nf4":
        pytest.importorskip("bitsandbytes")
    model, _ = open_model(str(base_model), "", f"cpu {store}", str(vocab_file))
    trained, _ = load_model(
        str(base_model), BuildOptions(model.compute_dtype, layout=as_trained(str(base_model), store))
    )
    found = [layer.store.mode for _, layer in matrices(model) if layer.store is not None]
    assert found and set(found) == {store}
    for (name, one), (_, two) in zip(matrices(model), matrices(trained), strict=True):
        assert one.merged().equal(two.merged()), name


def test_two_storages_of_one_matrix(base_model, vocab_file):
    """Which of the two a result belongs to would be anybody's guess."""
    assert storage_of("cpu int8", "none") == storage_of("cpu int8", "int8") == storage_of("auto", "int8") == "int8"
    with pytest.raises(ValueError, match="--strategy 'cpu int8' and --quant_mode nf4: two storages"):
        open_model(str(base_model), "", "cpu int8", str(vocab_file), quant="nf4")
    with pytest.raises(ValueError, match=r"merge the adapter first \(python merge.py\)"):
        open_model(str(base_model), str(base_model), "cpu int8", str(vocab_file))
