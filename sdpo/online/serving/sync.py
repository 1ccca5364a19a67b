"""How servers get the policy's weights: three ways, behind one interface.

WholeWeights   through a folder: pause, load, repack, name, resume
Adapters       through a folder: a new name for each version
Nccl           from the main rank's GPU to the servers', without a folder
"""

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.cuda import nccl

from sdpo_parallel.config import ExportDtype
from sdpo_parallel.engine import Engine

from ...errors import SdpoError
from .folders import check_weights, tensors
from .server import Away, Server


class Version(NamedTuple):
    """Weights on their way: after so many updates, what servers call them, and where they are."""

    number: int
    label: str
    folder: Path


class Fleet(NamedTuple):
    """The servers of a run, for its main rank."""

    servers: Sequence[Server]
    load: Callable[[], "Future[None]"]
    """Begins to have all of them load the newest version."""
    do: Callable[[Any], Any]
    """Runs a coroutine to its end."""


class Sync(Protocol):
    """How servers get weights."""

    adapters: bool
    """Answers are asked of a version's label, and not of the server's model."""

    def give(self, engine: Engine, new: Version, fleet: Fleet) -> None:
        """Give the engine's weights to all servers. All ranks call it together."""
        ...

    async def load(self, server: Server, new: Version, before: Version | None) -> None:
        """Let a server have a version, in place of the one that it had."""
        ...

    async def has(self, server: Server, version: Version) -> bool:
        """A server of which nothing is sure has a version, and answers with it."""
        ...

    async def leave(self, server: Server, root: Path) -> None:
        """Let a server do without the folders under ``root``."""
        ...


class WholeWeights:
    """All weights, through a folder.

    Args:
        base: the Hugging Face folder of the model.
    """

    adapters = False

    def __init__(self, base: Path, dtype: ExportDtype):
        self.base = base
        self.dtype: ExportDtype = dtype

    def give(self, engine: Engine, new: Version, fleet: Fleet) -> None:
        engine.export(str(new.folder), adapters=self.adapters, dtype=self.dtype)
        engine.on_main(lambda: (self.check(new), fleet.load().result())[1])

    def check(self, new: Version) -> None:
        """Refuse what a server would take in part, or not survive.

        Raises:
            SdpoError: names the file and the tensor.
        """
        check_weights(new.folder, self.base)

    async def load(self, server: Server, new: Version, before: Version | None) -> None:
        there = self.base if before is None else before.folder
        await server.load_weights(new.folder, new.label, there)

    async def has(self, server: Server, version: Version) -> bool:
        if await server.label() != version.label:
            return False
        await server.resume()  # it may have been lost behind the label
        return True

    async def leave(self, server: Server, root: Path) -> None:
        pass  # it has read them


class Adapters(WholeWeights):
    """The adapters alone, through a folder."""

    adapters = True

    def check(self, new: Version) -> None:
        tensors(new.folder)

    async def load(self, server: Server, new: Version, before: Version | None) -> None:
        await server.resume()  # a run that was killed may have paused it
        await server.load_adapter(new.label, new.folder)
        # this run's others, those of a killed process of it included
        await self.leave(server, new.folder.parent, but=new.label)

    async def leave(self, server: Server, root: Path, *, but: str = "") -> None:
        for name, folder in (await server.adapters()).items():
            if name != but and Path(folder).parent == root:
                await server.unload_adapter(name)

    async def has(self, server: Server, version: Version) -> bool:
        return (await server.adapters()).get(version.label) == str(version.folder)


class Nccl(WholeWeights):
    """All weights, from the main rank's GPU to the servers' in one NCCL group.

    After the signatures of vLLM 0.32's ``nccl`` backend, unpacked: a tensor after the other, in the
    order of their names. It has never run on GPUs: tests put a stand-in in NCCL's place.

    A server that was restarted joins with the next update, for which the group is made anew; until
    then it is left out. One that dies while it receives leaves the group waiting; the run's
    watchdog tells.

    Args:
        nccl: `torch.cuda.nccl`, or what stands in for it.
    """

    def __init__(self, base: Path, dtype: ExportDtype, nccl: Any = nccl):
        super().__init__(base, dtype)
        self.nccl, self.comm = nccl, None
        self.given: Version | None = None
        self.members: dict[str, int] = {}
        self.names: list[tuple[str, list[int]]] = []

    def give(self, engine: Engine, new: Version, fleet: Fleet) -> None:
        dtype = getattr(torch, self.dtype)
        if not self.names:
            self.names = [(name, list(weight.shape)) for name, weight in engine.weights()]
        loading: list[Future[None]] = []

        def begin() -> None:
            if alive := fleet.do(self._to_join(fleet.servers)):
                self._connect(alive, fleet.do, engine.device)
            loading.append(fleet.load())

        engine.on_main(begin)
        for _, weight in engine.weights():
            if engine.ranks.is_main and self.members:
                self.nccl.broadcast([weight.to(dtype).contiguous()], 0, comms=[self.comm])
        engine.on_main(lambda: loading[0].result())
        self.given = new

    async def load(self, server: Server, new: Version, before: Version | None) -> None:
        if server.url not in self.members or new == self.given:
            raise Away(f"{server.url} gets its weights with the next update")
        await server.receive_weights(self.names, self.dtype, new.label)

    async def _to_join(self, servers: Sequence[Server]) -> list[Server]:
        """All that can be reached, where they are not the group as it is."""
        alive, same = [], True
        for server in servers:
            try:
                label = await server.label()
            except Away:
                continue
            alive.append(server)
            same &= self.given is not None and label == self.given.label
        return [] if same and {s.url for s in alive} == self.members.keys() else alive

    def _connect(
        self, servers: Sequence[Server], do: Callable[[Any], Any], device: torch.device
    ) -> None:
        """A group of the main rank and all workers of these servers."""
        sizes = {server.url: do(server.world_size()) for server in servers}
        world = 1 + sum(sizes.values())
        unique = self.nccl.unique_id()

        async def join() -> "asyncio.Future[list[None]]":
            rank, joining = 1, []
            for server in servers:
                shared = base64.b64encode(unique).decode()
                joining.append(server.join_group(rank, world, shared))
                rank += sizes[server.url]
            return asyncio.ensure_future(asyncio.gather(*joining))

        async def joined(tasks: "asyncio.Future[list[None]]") -> None:
            await tasks

        tasks = do(join())
        time.sleep(0.5)  # the requests are out before this thread waits in NCCL
        self.comm = self.nccl.init_rank(world, unique, 0)
        self.nccl.all_reduce([torch.zeros(1, device=device)], comms=[self.comm])  # as they do
        do(joined(tasks))
        self.members = sizes


def sync_of(kind: str, base: Path, dtype: ExportDtype) -> Sync:
    """The one that a config names.

    Raises:
        SdpoError: this machine has no NCCL for it.
    """
    if kind == "nccl" and not torch.cuda.is_available():
        raise SdpoError('sampler.sync = "nccl" needs GPUs; use "weights"')
    return {"weights": WholeWeights, "adapters": Adapters, "nccl": Nccl}[kind](base, dtype)
