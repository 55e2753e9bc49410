"""llama.cpp as judge of adapters: what it lays over the base is what was trained."""

import dataclasses

import pytest

from rwkv_rlhf.checkpoints import exporting
from rwkv_rlhf.checkpoints.adapter_files import open_adapter
from rwkv_rlhf.checkpoints.exporters.gguf_lora import to_gguf_lora
from rwkv_rlhf.checkpoints.exporting import About, ExportOptions, Vocabulary, export_model, open_exported
from rwkv_rlhf.settings.exports import EXPORTS
from tests.support.merging import plan_of, trained

VOCABULARY = Vocabulary({number + 1: bytes([number]) for number in range(256)}, (), "")


def with_head(mode):
    """All matrices of the blocks, and the head at another rank and scale."""
    plan = plan_of(mode)
    head = dataclasses.replace(plan.rows["0"], layer="head", rank=4, alpha=2.0)
    return dataclasses.replace(plan, rows={**plan.rows, "head": head})


@pytest.mark.slow
@pytest.mark.parametrize("version", EXPORTS["gguf"].target.versions)
@pytest.mark.parametrize("mode", ["lora", "pissa"])
def test_llama_cpp_lays_an_adapter_over_the_base_as_this_program(tmp_path, mode, version):
    """If this breaks, somebody's adapter is applied at another scale, or to some of its matrices only."""
    pytest.importorskip("xllamacpp", reason="a test dependency of its own (requirements-test.txt)")
    pytest.importorskip("gguf", reason="gguf is an extra of its own (requirements.txt)")
    base, checkpoint, _ = trained(tmp_path, mode, version=version, plan=with_head(mode), limited=True)
    file = open_adapter(checkpoint)
    assert {"head", "blocks.0.att.output", "blocks.1.ffn.value"} < file.layout.adapted.keys()
    assert "adapters for llama.cpp" in to_gguf_lora(file, tmp_path / "adapter.gguf")
    plain = open_exported(base, None, VOCABULARY, About("base"))
    export_model("gguf", plain, tmp_path / "base.gguf", ExportOptions("f32", 1 << 30, check=False))
    target = EXPORTS["gguf"].target
    own = exporting.own_logprobs(open_exported(base, checkpoint, VOCABULARY, About("with adapter")))
    assert exporting.judged(tmp_path / "base.gguf", target, own, lora=tmp_path / "adapter.gguf") < 1e-5
    assert exporting.judged(tmp_path / "base.gguf", target, own) > 1e-3


@pytest.mark.parametrize(
    "mode, more, words",
    [
        ("lora", {}, r"no place for blocks\.0\.att\.\S+, .* and 4\d more: export the model with its adapter merged in"),
        ("bone", {"limited": True}, r"no place for blocks\.0\.att\.receptance \(bone\)"),
        ("dora", {"limited": True}, r"no place for blocks\.0\.att\.receptance \(dora\)"),
        ("state", {}, r"no place for blocks\.0\.att\.time_state"),
        ("lora", {"limited": True, "version": "x052"}, "adapters of x060 and x070, this one is of x052"),
    ],
)
def test_what_llama_cpp_cannot_lay_over_a_model_is_refused_by_name(tmp_path, mode, more, words):
    """If this breaks, what was trained is lost in an export without a word."""
    pytest.importorskip("gguf", reason="gguf is an extra of its own (requirements.txt)")
    _, checkpoint, _ = trained(tmp_path, mode, **more)
    with pytest.raises(ValueError, match=words):
        to_gguf_lora(open_adapter(checkpoint), tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()
