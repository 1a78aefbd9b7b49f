"""One run on several machines: torchrun's c10d rendezvous, and what NCCL leaves behind when a collective hangs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from moe.config import ConfigError

FLAGS = {
    "--nnodes N": "machines; every one runs this command with its own --node-rank; default 1",
    "--node-rank R": "this machine, from 0; 0 looks after the run folder, which all must see",
    "--rdzv-endpoint HOST:PORT": "a free port of machine 0, where they meet",
    "--rdzv-id ID": "name of the meeting, the same on all; default alf-moe",
    "--local-addr ADDRESS": "address of this machine where its name does not lead the others to it",
}
FLIGHT_RECORDER = 2000  # collectives that NCCL's flight recorder keeps: about 1 MB a rank


@dataclass
class Hosts:
    """The machines of a run, as their flags say."""

    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str | None = None
    rdzv_id: str = "alf-moe"
    local_addr: str | None = None

    def check(self, clean: bool) -> None:
        """Raises ConfigError."""
        if self.nnodes == 1:
            if self.rdzv_endpoint is not None or self.node_rank:
                flag = "--rdzv-endpoint" if self.rdzv_endpoint is not None else f"--node-rank {self.node_rank}"
                raise ConfigError(
                    f"{flag} is for several machines, and --nnodes is 1: set --nnodes, or leave {flag} out"
                )
            return
        if self.rdzv_endpoint is None:
            raise ConfigError(
                f"--nnodes {self.nnodes} has no --rdzv-endpoint: name a free port of machine 0, as in --rdzv-endpoint host:29400"
            )
        port = self.rdzv_endpoint.rpartition(":")[2]
        if ":" not in self.rdzv_endpoint or not port.isdecimal():
            raise ConfigError(
                f"--rdzv-endpoint {self.rdzv_endpoint} has no port: write HOST:PORT, for example host:29400"
            )
        if self.node_rank >= self.nnodes:
            raise ConfigError(
                f"--node-rank {self.node_rank} is not below --nnodes {self.nnodes}: number the machines 0 to {self.nnodes - 1}"
            )
        if clean:
            raise ConfigError(
                f"--clean would remove a folder that {self.nnodes} machines write to: "
                "remove it yourself, or choose another --run.name"
            )

    def torchrun(self) -> list[str]:
        """torchrun's own flags."""
        if self.nnodes == 1:
            return ["--standalone"]
        words = ["--nnodes", str(self.nnodes), "--node-rank", str(self.node_rank), "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", str(self.rdzv_endpoint), "--rdzv-id", self.rdzv_id]
        # torchrun would look for itself behind the endpoint's name, and finds only what this machine's own name leads to.
        words += ["--rdzv-conf", f"is_host={int(self.node_rank == 0)}"]
        return words + (["--local-addr", self.local_addr] if self.local_addr else [])

    def again(self) -> list[str]:
        """The flags of this machine's next start."""
        if self.nnodes == 1:
            return []
        words = ["--nnodes", str(self.nnodes), "--node-rank", str(self.node_rank)]
        return [*words, "--rdzv-endpoint", str(self.rdzv_endpoint)]

    def afresh(self) -> list[str]:
        """What makes a start without a checkpoint possible; several machines cannot ask for it."""
        return ["--clean"] if self.nnodes == 1 else []

    def logs(self, run_dir: Path) -> Path:
        """Where this machine's log files go."""
        return run_dir / "logs" / (f"host-{self.node_rank}" if self.node_rank else "")

    def environment(self, logs: Path) -> dict[str, str]:
        """When a collective hangs and what is then written: every rank's last collectives, for torchfrtrace."""
        trace = str(logs.absolute() / "nccl_trace_rank_")
        found = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
        # The second names are those of torch before 2.9.
        found |= {"TORCH_FR_BUFFER_SIZE": str(FLIGHT_RECORDER), "TORCH_NCCL_TRACE_BUFFER_SIZE": str(FLIGHT_RECORDER)}
        found |= {"TORCH_FR_DUMP_TEMP_FILE": trace, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": trace}
        return found | {name: os.environ[name] for name in found if name in os.environ}
