"""What is said of a run before it begins: its length in passes, and what in it defeats itself."""

import pytest

from rwkv_rlhf.data.sampler import Sequential, Steps
from rwkv_rlhf.model.sizes import Sizes
from rwkv_rlhf.plan import plan_for
from rwkv_rlhf.plan.writing import profile_text
from rwkv_rlhf.settings.command_line import UsageError, parse
from rwkv_rlhf.settings.counted import counted
from rwkv_rlhf.training.choices import Pass, with_length, with_pass
from rwkv_rlhf.training.length import optimizer_steps
from rwkv_rlhf.training.overview import NO_ROOM, Room, refuse_too_large, say_room
from rwkv_rlhf.training.recipe import length_lines, odd_length, odd_values, unheard

WORDS = ("--load_model", "M", "--accelerator", "cpu", "--micro_bsz", "2", "--accumulate_grad_batches", "8")


class Examples(list):
    """Sixty examples of one target each."""

    def trained(self, index):
        return 1


def run_of(*words, examples=60):
    """(Config, steps) of a DPO run with these words over so many examples, sixteen to an optimizer step."""
    config = with_length(parse([*WORDS, "--dpo", "1", "--rlhf_train_file", "P.save", *map(str, words)]))
    steps = Steps(Examples(range(examples)), Sequential(examples), 2, 8)
    return with_pass(config, steps), steps


def test_the_length_of_a_run_in_passes():
    """If this breaks, nobody sees that 500 mini-epochs of 1000 micro-batches are thousands of passes over 60 pairs."""
    config, steps = run_of("--epoch_steps", 200, "--epoch_count", 10, "--warmup_steps", 100)
    assert list(length_lines(config, steps)) == [
        "60 examples, 3.8 optimizer steps a pass; 250 steps are 66.7 passes, 100 of them warm-up (40%)"
    ]
    many, long = odd_length(config, steps)
    assert "67 passes over the same examples" in many and "--warmup_steps 100 is 40% of 250 steps" in long
    assert not list(odd_length(*run_of("--epochs", 3, "--warmup_steps", 2)))
    assert any("--micro_bsz 2 is more than the 1 example:" in line for line in odd_length(*run_of(examples=1)))


@pytest.mark.parametrize("words", [("--epochs", 3), ()])
def test_epochs_are_passes(words):
    """--epochs N ends after N passes, each a mini-epoch; where no length was typed it is three of them."""
    config, steps = run_of(*words)
    assert (config.epoch_count, config.epoch_steps, optimizer_steps(config, steps)) == (3, 32, 12)


def test_a_typed_length_stays():
    """If this breaks, commands of the tradition train for another time."""
    config, _ = run_of("--epoch_count", 7)
    assert (config.epochs, config.epoch_count, config.epoch_steps) == (0, 7, 1000)
    corpus = with_length(parse([*WORDS, "--data_file", "C", "--data_type", "binidx"]))
    assert (corpus.epoch_count, corpus.epoch_steps) == (500, 1000)
    for words in (["--epoch_count", "7"], ["--data_file", "C", "--data_type", "binidx", "--sft", "1"]):
        with pytest.raises(UsageError, match="--epochs 3"):
            parse([*WORDS, "--data_file", "D.jsonl", *words, "--epochs", "3"])


def test_numbers_that_are_hardly_meant(tmp_path):
    """If this breaks, a rate of 1 or a rank of 100,000 is found out by its result."""
    sizes = Sizes(version="x070", n_layer=2, n_embd=64, vocab_size=257, dim_att=64, dim_ffn=256, head_size=64)

    def said(*words):
        config = parse([*WORDS, "--data_file", "D", *map(str, words)])
        return " ".join(odd_values(config, plan_for(config, 2), sizes))

    assert not said("--lr_init", 1e-3, "--peft", "lora", "--lora_r", 64)
    assert "learning rate of 1 for weights" in said("--lr_init", 1)
    assert "rank 100000 is more than the width" in said("--peft", "lora", "--lora_r", 100_000)
    assert "--devices 4096 on a CPU" in said("--devices", 4096)
    assert not said("--lr_init", 0.1, "--state", 1)  # states learn at such rates


def test_rates_that_a_profile_overrides(tmp_path):
    """If this breaks, somebody tunes --lr_init for a day, and the profile has its own."""
    path = tmp_path / "p.csv"
    path.write_text(profile_text("lora", 2, lr_init=2e-5))

    def said(*words):
        config = parse([*WORDS, "--data_file", "D", "--layer_profile", str(path), *map(str, words)])
        return list(unheard(config, plan_for(config, 2)))

    assert said("--lr_init", 5e-6) == [
        f"--lr_init 5e-06 has no effect: {path} has its own (2e-05); --lr_advanced 0 takes the flags"
    ]
    assert not said() and not said("--lr_init", 2e-5) and not said("--lr_init", 5e-6, "--lr_advanced", 0)


def test_a_run_too_large_for_its_gpu_is_refused(caplog):
    """If this breaks, a run ends out of memory after its first minutes, or one that would fit cannot be tried."""
    config, large = run_of()[0], Room(30 << 30, 24 << 30, True)
    with pytest.raises(
        ValueError, match=r"of the GPU: does not fit, by the estimate; what saves .*\{force\} 1 tries it"
    ):
        refuse_too_large(config, large)
    split = (("--strategy", "deepspeed_stage_2_offload"), ("--strategy", "fsdp", "--devices", 2), ("--train_tables", 1))
    for words in (("--force", 1), *split):
        refuse_too_large(run_of(*words)[0], large)
    for room in (large._replace(gpu=False), Room(23 << 30, 24 << 30, True), NO_ROOM):
        refuse_too_large(config, room)
    say_room(config, Room(23 << 30, 24 << 30, True))
    assert "may not fit. What saves most: --" in caplog.text


@pytest.mark.parametrize(
    ("examples", "at_once", "again", "steps", "whole"), [(10, 4, 1, 2.5, 3), (10, 5, 3, 6.0, 6), (1, 4, 2, 0.5, 2)]
)
def test_a_pass_by_hand(examples, at_once, again, steps, whole):
    """If this breaks, the passes that are said and those of --epochs are two things."""
    found = Pass(examples, again, at_once)
    assert (found.steps, found.whole_steps) == (steps, whole)


def test_a_number_with_its_noun():
    """If this breaks, a run says "1 passes"."""
    assert [
        counted(1, "step"),
        counted(1200, "step"),
        counted(0.5, "pass", "passes"),
        counted(1.0, "pass"),
        counted(4000.0, "pass", "passes"),
    ] == [
        "1 step",
        "1,200 steps",
        "0.5 passes",
        "1 pass",
        "4,000 passes",
    ]
