"""Settings that follow from the counts of another program's flags."""

import math


def ppo_length(samples: int, batch_size: int, micro_bsz: int, passes: int, save_freq: int) -> dict[str, int]:
    """Micro-batches, mini-epochs and saves of PPO, whose own flags count samples and rollouts.

    samples: of the whole run. batch_size: samples of a rollout, which is trained on `passes` times in micro-batches of
    micro_bsz. save_freq: rollouts between two saves, 0 = one at the end. All others are >= 1.
    """
    rollouts = math.ceil(samples / batch_size)
    saved = min(save_freq or rollouts, rollouts)
    return {
        "micro_bsz": micro_bsz,
        "epoch_steps": saved * passes * max(1, batch_size // micro_bsz),
        "epoch_count": math.ceil(rollouts / saved),
        "epoch_save": 1,
    }
