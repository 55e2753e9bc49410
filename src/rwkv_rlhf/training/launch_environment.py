"""What Lightning asks about the processes of a run, answered by those who started them (`distributed/launch.py`)."""

from __future__ import annotations

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment

from rwkv_rlhf.distributed.launch import RankInfo


class LaunchEnvironment(ClusterEnvironment):
    """Tells Lightning what `RankInfo` says; the processes exist before its trainer does."""

    def __init__(self, info: RankInfo) -> None:
        super().__init__()
        self.info = info

    @property
    def creates_processes_externally(self) -> bool:
        """True: Lightning starts none."""
        return True

    @property
    def main_address(self) -> str:
        """The machine of rank 0."""
        return self.info.address

    @property
    def main_port(self) -> int:
        """The port of rank 0."""
        return self.info.port

    @staticmethod
    def detect() -> bool:
        """True: this environment is passed to the trainer, not looked for."""
        return True

    def world_size(self) -> int:
        """The number of processes."""
        return self.info.world

    def set_world_size(self, size: int) -> None:
        """Lightning must agree with what is known already."""
        assert size == self.info.world, (size, self.info)

    def global_rank(self) -> int:
        """The rank among all."""
        return self.info.rank

    def set_global_rank(self, rank: int) -> None:
        """Lightning must agree with what is known already."""
        assert rank == self.info.rank, (rank, self.info)

    def local_rank(self) -> int:
        """The rank on this machine."""
        return self.info.local_rank

    def node_rank(self) -> int:
        """The number of this machine."""
        return self.info.node
