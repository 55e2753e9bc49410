"""What a process knows about itself and the others, from flags and the launcher's variables."""

import os
import socket

import pytest

from rwkv_rlhf.commands import train
from rwkv_rlhf.distributed import launch
from rwkv_rlhf.distributed.launch import RankInfo, launched, rank_info_of
from rwkv_rlhf.settings.command_line import parse
from tests.support.rank_cases import shared_words


@pytest.fixture
def words(base_model, vocab_file, text_jsonl, tmp_path):
    """A run that nobody starts."""
    words = [*shared_words(base_model, vocab_file), "--sft", 1, "--data_file", text_jsonl, "--proj_dir", tmp_path]
    return [str(word) for word in (*words, "--micro_bsz", 1, "--epoch_steps", 100000)]


def test_a_run_leaves_no_variables_behind():
    """If this breaks, what DeepSpeed tells itself of one process is believed by processes that are started later."""
    before = dict(os.environ)
    config = parse(["--load_model", "M", "--proj_dir", "P", "--data_file", "D"])
    with launched(config, []):
        os.environ.update(RANK="0", WORLD_SIZE="1")
    assert dict(os.environ) == before


PLACES = [
    ({}, (), (0, 1, 0, 1, "")),
    ({}, ("--devices", 4), (0, 4, 0, 4, "")),
    ({"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "9"}, ("--devices", 4, "--num_nodes", 2), (4, 8, 0, 4, "")),
    (
        {
            **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            **{"MASTER_ADDR": "a", "MASTER_PORT": "9"},
        },
        (),
        (5, 8, 1, 4, "torchrun"),
    ),
    (
        {
            **{"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"},
            **{"SLURM_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "4711", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0"},
        },
        ("--devices", 4, "--num_nodes", 2),
        (5, 8, 1, 4, "srun"),
    ),
    ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "bash"}, (), (0, 1, 0, 1, "")),
    # an sbatch script without srun: nobody started the second task, and nobody must wait for it
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "t"}, (), (0, 1, 0, 1, "")),
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, ("--devices", 2), (0, 2, 0, 2, "")),
]


@pytest.mark.parametrize(("variables", "flags", "expected"), PLACES)
def test_a_process_knows_its_place(words, variables, flags, expected):
    """If this breaks, processes of a launcher meet at the wrong address or share the wrong ranks."""
    place = rank_info_of(parse([str(word) for word in (*words, *flags)]), variables)
    assert (*place[:4], place.launcher) == expected
    if place.launcher == "srun":
        assert (place.address, place.port) == ("gpu07", 19711)


WRONG = {
    ("--devices", 3): {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2},
    ("--num_nodes", 2): {"NODE_RANK": 0},
    ("--num_nodes", 2, "--devices", 1): {"NODE_RANK": 2},
    ("--devices", 2, "--num_nodes", 1): {"RANK": "x", "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2},
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_launcher_that_disagrees_is_refused(words, flags):
    """If this breaks, a wrong number of processes trains, or waits for ever for one that never comes."""
    address = {} if len(flags) == 2 and flags[0] == "--num_nodes" else {"MASTER_ADDR": "a", "MASTER_PORT": "9"}
    variables = {name: str(value) for name, value in WRONG[flags].items()} | address
    with pytest.raises(ValueError, match=r"\{(devices|num_nodes)\}|RANK"):
        rank_info_of(parse([str(word) for word in (*words, *flags)]), variables)


REFUSED = {
    ("--strategy", "fsdp", "--infctx", 1, "--chunk_ctx", 8): "infinite context",
    ("--strategy", "deepspeed_stage_3", "--state_cp", 1, "--ctx_parts", 4): "deepspeed_stage_2",
    ("--strategy", "deepspeed_stage_3_offload", "--state", 1): "--grad_cp 0",
    ("--strategy", "deepspeed_stage_2", "--precision", "fp64"): "--precision fp64",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_does_not_go_together_is_refused_at_once(words, script, flags):
    """If this breaks, a combination that would hang or learn something else fails after an hour of loading."""
    words = [word if word != words[1] else "no-such-model.pth" for word in words]
    status, _, err = script(train.main, *words, *flags)
    assert status == 2 and REFUSED[flags] in err and flags[1] in err


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
SRUN = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (TORCHRUN | {"MASTER_PORT": "9", "WORLD_SIZE": "0"}, r"rank 0 of 0 \(WORLD_SIZE\).*that cannot be; unset RANK"),
        (TORCHRUN | {"MASTER_PORT": "9", "RANK": "2"}, "rank 2 of 2"),
        (TORCHRUN | {"MASTER_PORT": "9", "LOCAL_WORLD_SIZE": "0"}, "0 of 0 on its machine"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "port 99999"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "MASTER_PORT is 'x', expected a whole number"),
        (SRUN | {"SLURM_NNODES": "0"}, "2 tasks on 0 machines"),
        (SRUN | {"SLURM_PROCID": "-1"}, "rank -1 of 2"),
    ],
)
def test_numbers_of_a_launcher_that_cannot_be(words, variables, said):
    """Left over in a shell: if this breaks, the run divides by zero, or waits for processes that nobody starts."""
    with pytest.raises(ValueError, match=said):
        rank_info_of(parse(words), variables)


def test_who_is_waited_for_is_said(monkeypatch, caplog):
    """If this breaks, a job of which one task never started hangs in silence."""
    monkeypatch.setattr(launch, "WAITING", 0.1)
    monkeypatch.setattr(launch, "SPARE", 0.0)
    with socket.socket() as taken:  # its number is free a moment later
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    info = RankInfo(0, 2, 0, 2, port=port)
    with pytest.raises(RuntimeError, match=f"rank 0 could not connect to all 2 ranks at 127.0.0.1 port {port}"):
        launch._connect(info, "gloo", timeout=0.02)
    assert f"rank 0 waits for the other 1 of 2 processes at 127.0.0.1 port {port}" in caplog.text
