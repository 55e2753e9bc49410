"""llama.cpp as judge of adapters: what it lays over the base is what was trained."""

import pytest

from rwkv_rlhf.checkpoints import exporting
from rwkv_rlhf.checkpoints.adapter_files import open_adapter
from rwkv_rlhf.checkpoints.exporters.gguf_lora import to_gguf_lora
from rwkv_rlhf.checkpoints.exporting import About, ExportOptions, Vocabulary, export_model, open_exported
from rwkv_rlhf.settings.exports import EXPORTS
from tests.support.merging import trained

VOCABULARY = Vocabulary({number + 1: bytes([number]) for number in range(256)}, (), "")


@pytest.mark.slow
@pytest.mark.parametrize("version", EXPORTS["gguf"].target.versions)
@pytest.mark.parametrize("mode", ["lora", "pissa"])
def test_llama_cpp_lays_an_adapter_over_the_base_as_this_program(tmp_path, mode, version):
    """If this breaks, somebody's adapter is applied at another scale, or to some of its matrices only."""
    pytest.importorskip("xllamacpp", reason="a test dependency of its own (requirements-test.txt)")
    pytest.importorskip("gguf", reason="gguf is an extra of its own (requirements.txt)")
    base, checkpoint, _ = trained(tmp_path, mode, version=version, limited=True)
    file = open_adapter(checkpoint)
    assert {name.split(".")[-1] for name in file.layout.adapted} >= {"receptance", "key", "value", "output"}
    assert "adapters for llama.cpp" in to_gguf_lora(file, tmp_path / "adapter.gguf")
    plain = open_exported(base, None, VOCABULARY, About("base"))
    export_model("gguf", plain, tmp_path / "base.gguf", ExportOptions("f32", 1 << 30, check=False))
    target = EXPORTS["gguf"].target
    own = exporting.own_logprobs(open_exported(base, checkpoint, VOCABULARY, About("with adapter")))
    assert exporting.judged(tmp_path / "base.gguf", target, own, lora=tmp_path / "adapter.gguf") < 1e-5
    assert exporting.judged(tmp_path / "base.gguf", target, own) > 1e-3
