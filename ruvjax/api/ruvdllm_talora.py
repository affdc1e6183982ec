"""TALoRAManager, the documented handle on three banks of adapters, over `ruvjax.lora`.

Arrays given to it may be of numpy or jax; what it returns is of jax, and `apply` returns the changed output instead of
writing into it. One thread at a time may change a manager, and none while text is generated with it: its arrays are
updated in place.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ruvjax import errors
from ruvjax.api.ruvdllm_errors import ConfigError, TALoRAError
from ruvjax.api.ruvdllm_micro import MicroLoRA
from ruvjax.lora import ann, bankfile, talora
from ruvjax.lora import bank as banking
from ruvjax.lora.bank import NONE, Bank, Eviction
from ruvjax.lora.talora import EXACT, TIMESTEPS, Search, TALoRA, Weighting

_store = jax.jit(banking.store, static_argnames="eviction", donate_argnums=0)
_remove = jax.jit(banking.remove, donate_argnums=0)
_touch = jax.jit(banking.touch, donate_argnums=0)
_record = jax.jit(banking.record, donate_argnums=0)
_retrieve = jax.jit(talora.retrieve, static_argnames=("config", "k", "searches"))


@dataclass(frozen=True)
class TALoRAConfig:
    """The documented settings, and below them what the documents leave open. Raises ConfigError.

    layer: the layer before which adapters act; None: the middle one. eviction: who leaves a full bank, "lru" or
    "success" (`lora.bank.store`). The others are those of `lora.talora.TALoRA`. Banks of more than 100,000 places are
    searched approximately once they hold more than that, with faiss (the extra `ann`).
    """

    hidden_dim: int
    coarse_capacity: int = 10_000
    coarse_rank: int = 8
    domain_capacity: int = 50_000
    domain_rank: int = 4
    fine_capacity: int = 100_000
    fine_rank: int = 2
    boundaries: tuple[int, int] = (700, 300)
    transition_width: int = 50
    top_k: int = 5
    layer: int | None = None
    eviction: Eviction = "lru"
    weighting: Weighting = "similarity"
    temperature: float = 0.1

    def __post_init__(self):
        if self.eviction not in ("lru", "success"):
            raise ConfigError(f"eviction={self.eviction!r} is not known", "lru or success")
        self.talora(1)

    def talora(self, layers: int) -> TALoRA:
        """The same settings for a model of so many layers."""
        names = ("coarse", "domain", "fine")
        banks = tuple((getattr(self, f"{name}_capacity"), getattr(self, f"{name}_rank")) for name in names)
        try:
            return TALoRA(
                hidden=self.hidden_dim,
                banks=banks,
                boundaries=tuple(self.boundaries),
                width=self.transition_width,
                layer=layers // 2 if self.layer is None else self.layer,
                k=self.top_k,
                weighting=self.weighting,
                temperature=self.temperature,
            )
        except (errors.ConfigError, TypeError) as error:
            raise ConfigError(f"TALoRAConfig: {error}", getattr(error, "hint", "")) from error


@dataclass(frozen=True, order=True)
class AdapterId:
    """The name of a stored adapter: its bank (0 coarse, 1 domain, 2 fine) and its number there, which is never used
    again."""

    bank: int
    number: int


@dataclass(frozen=True)
class TALoRARetrievalResult:
    """The adapters for a query, those of one bank after those of another, the most similar first."""

    ids: tuple[AdapterId, ...]
    adapters: tuple[MicroLoRA, ...]
    similarities: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class TALoRAStats:
    """Of each bank: adapters, places and bytes (keys included). retrievals: calls of `retrieve` since it was made."""

    sizes: tuple[int, ...]
    capacities: tuple[int, ...]
    bytes: tuple[int, ...]
    retrievals: int

    @property
    def total(self) -> int:
        return sum(self.sizes)


class TALoRAManager:
    """Three banks of adapters, by timestep (0 to 1000, 1000: all masks)."""

    def __init__(self, config: TALoRAConfig):
        self.config = config
        self._talora = config.talora(1)
        self._banks = list(talora.empty_banks(self._talora))
        self._indexes: dict[int, ann.Index] = {}
        self._retrievals = 0

    @classmethod
    def new(cls, config: TALoRAConfig) -> "TALoRAManager":
        """A manager with empty banks."""
        return cls(config)

    @property
    def banks(self) -> tuple[Bank, ...]:
        """The banks, for `ruvjax.lora`; gone after the next change of the manager."""
        return tuple(self._banks)

    def retrieve(self, query: Any, timestep: int, top_k: int) -> TALoRARetrievalResult:
        """The `top_k` adapters of each bank that has a share at `timestep`, by the cosine of their keys and `query`
        [hidden]; nothing for empty banks. They count as used.

        Raises TALoRAError for a query of another width or one that is not finite, and a top_k beyond a bank.
        """
        vector, t = self._query(query), self._time(timestep)
        self._fits(top_k)
        hits = _retrieve(self._talora, self.banks, vector[None, None], t, top_k, searches=self.searches())
        self._retrievals += 1
        return self._result([np.asarray(hit.slots[0, 0]) for hit in hits], [hit.similarity[0, 0] for hit in hits])

    def store(self, adapter: MicroLoRA, query_embedding: Any, timestep: float | int) -> AdapterId:
        """Store `adapter` in the bank of `timestep` (above 700 coarse, above 300 domain, else fine), to be found by
        `query_embedding` [hidden]; a full bank evicts one.

        Raises TALoRAError, and changes nothing, for an adapter of another rank or width, and for one or a key that is
        not finite.
        """
        self._time(timestep)
        number = self._talora.bank_of(timestep)
        bank = self._banks[number]
        try:
            banking.check(bank, query_embedding, adapter.a, adapter.b)
        except errors.InputError as error:
            raise TALoRAError(f"the adapter for timestep {timestep}: {error}", error.hint) from error
        key = jnp.asarray(query_embedding, jnp.float32)
        self._banks[number], stored = _store(bank, key, adapter.a, adapter.b, eviction=self.config.eviction)
        self._indexes.pop(number, None)
        return AdapterId(number, int(stored.id))

    def remove(self, id: AdapterId) -> MicroLoRA:
        """Take an adapter out. Raises TALoRAError for an id that is not there."""
        slot = self._slot(id)
        taken = self._adapter(id.bank, slot)
        self._banks[id.bank], _ = _remove(self._banks[id.bank], np.int32(id.number))
        self._indexes.pop(id.bank, None)
        return taken

    def record(self, id: AdapterId, outcome: float) -> None:
        """Note how well an adapter served, from 0 to 1: what eviction by success goes by. Raises TALoRAError for an id
        that is not there and an outcome outside 0 to 1."""
        slot = self._slot(id)
        if not 0 <= outcome <= 1:
            raise TALoRAError(f"outcome={outcome!r} must be from 0 to 1")
        self._banks[id.bank] = _record(
            self._banks[id.bank], np.asarray([slot], np.int32), np.asarray([outcome], np.float32)
        )

    def apply(
        self, output: Float[Array, "*batch hidden"] | Any, result: TALoRARetrievalResult, timestep: int
    ) -> Float[Array, "*batch hidden"]:
        """`output` and what the adapters of `result` make of it, each by its similarity and the share of its bank at
        `timestep`. Raises TALoRAError for an output of another width."""
        output = jnp.asarray(output)
        if output.shape[-1:] != (self.config.hidden_dim,):
            raise TALoRAError(f"an output of shape {output.shape}, the adapters are {self.config.hidden_dim} wide")
        total = output
        for adapter, weight in zip(result.adapters, self._weights(result, timestep)):
            total = total + weight.astype(output.dtype) * adapter.apply(output)
        return total

    def stats(self) -> TALoRAStats:
        """What the banks hold."""
        return TALoRAStats(
            sizes=tuple(int(banking.size(bank)) for bank in self._banks),
            capacities=tuple(bank.capacity for bank in self._banks),
            bytes=tuple(bank.nbytes for bank in self._banks),
            retrievals=self._retrievals,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write banks and settings to one file, whole or not at all (`lora.bankfile`). Raises RunError for a full disk,
        TALoRAError for a path that cannot be written; the file that was there is then unchanged."""
        try:
            bankfile.save(path, self._banks, {"config": json.dumps(dataclasses.asdict(self.config))})
        except errors.InputError as error:
            raise TALoRAError(str(error), error.hint) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TALoRAManager":
        """Read what `save` wrote. Raises TALoRAError, naming the file, for one that is missing, damaged or foreign."""
        try:
            banks, meta = bankfile.load(path)
            values = json.loads(meta["config"])
            config = TALoRAConfig(**{**values, "boundaries": tuple(values["boundaries"])})
            talora.check(config.talora(1), banks)
        except errors.RuvjaxError as error:
            raise TALoRAError(str(error), error.hint) from error
        except (KeyError, TypeError, ValueError) as error:
            raise TALoRAError(f"{path} holds banks, but not those of a TALoRAManager") from error
        made = cls.__new__(cls)
        made.config, made._talora, made._banks = config, config.talora(1), list(banks)
        made._indexes, made._retrievals = {}, 0
        return made

    def recall(self, queries: Float[Array, "queries hidden"] | Any, top_k: int) -> tuple[float | None, ...]:
        """Of each bank that is searched approximately, the share of what the exact search finds for `queries` that it
        finds too; None for banks that are searched exactly."""
        self._fits(top_k)
        wide = jnp.asarray(queries, jnp.float32)
        return tuple(
            None if search is banking.retrieve else ann.recall(self._indexes[number], bank, wide, top_k)
            for number, (search, bank) in enumerate(zip(self.searches(), self._banks))
        )

    def searches(self) -> tuple[Search, ...]:
        """How each bank is searched: exactly, or by an index that is built when it is first needed after a change.
        Raises BackendError where one is needed and faiss is not installed."""
        found: list[Search] = []
        for number, bank in enumerate(self._banks):
            if bank.capacity > EXACT and int(banking.size(bank)) > EXACT:
                if number not in self._indexes:
                    self._indexes[number] = ann.build(bank)
                found.append(self._indexes[number].search)
            else:
                found.append(banking.retrieve)
        return tuple(found)

    def _query(self, query: Any) -> jax.Array:
        vector = np.asarray(query, np.float32)
        if vector.shape != (self.config.hidden_dim,):
            raise TALoRAError(f"a query of shape {vector.shape}, the keys are [{self.config.hidden_dim}]")
        if not np.isfinite(vector).all():
            raise TALoRAError("the query is not finite")
        return jnp.asarray(vector)

    def _time(self, timestep: Any) -> jax.Array:
        number = isinstance(timestep, (int, float, np.integer, np.floating)) and not isinstance(timestep, bool)
        if not number or not 0 <= timestep <= TIMESTEPS:
            raise TALoRAError(f"timestep={timestep!r} must be a number from 0 to {TIMESTEPS}")
        return jnp.full((1,), float(timestep), jnp.float32)

    def _fits(self, top_k: Any) -> None:
        least = min(bank.capacity for bank in self._banks)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= least:
            raise TALoRAError(f"top_k={top_k!r} must be a whole number from 1 to {least}, the smallest bank")

    def _slot(self, id: AdapterId) -> int:
        known = isinstance(id, AdapterId) and 0 <= id.bank < len(self._banks)
        slot = int(banking.slot_of(self._banks[id.bank], id.number)) if known else NONE
        if slot == NONE:
            raise TALoRAError(f"there is no adapter {id!r}", "it was removed or evicted, or never stored here")
        return slot

    def _adapter(self, number: int, slot: int) -> MicroLoRA:
        bank = self._banks[number]
        return MicroLoRA.from_matrices(bank.a[slot].astype(jnp.float32), bank.b[slot].astype(jnp.float32))

    def _result(self, slots: Sequence[np.ndarray], similarity: Sequence[Any]) -> TALoRARetrievalResult:
        ids: list[AdapterId] = []
        adapters: list[MicroLoRA] = []
        cosines: list[float] = []
        for number, (found, values) in enumerate(zip(slots, similarity)):
            kept = found[found != NONE]
            if not kept.size:
                continue
            names = np.asarray(self._banks[number].ids)
            ids += [AdapterId(number, int(names[slot])) for slot in kept]
            adapters += [self._adapter(number, int(slot)) for slot in kept]
            cosines += [float(value) for value in np.asarray(values)[found != NONE]]
            self._banks[number] = _touch(self._banks[number], found)
        return TALoRARetrievalResult(tuple(ids), tuple(adapters), tuple(cosines))

    def _weights(self, result: TALoRARetrievalResult, timestep: int) -> list[jax.Array]:
        """What each adapter of a result counts at a timestep."""
        shares = talora.blend(self._talora, self._time(timestep))[:, 0]
        weights: list[jax.Array] = []
        for number, share in enumerate(shares):
            values = [value for id, value in zip(result.ids, result.similarities) if id.bank == number]
            if values:
                slots = jnp.arange(len(values), dtype=jnp.int32)[None, None]
                hits = talora.Hits(slots, jnp.asarray(values, jnp.float32)[None, None], share[None])
                weights += list(talora.weigh(self._talora, hits)[0, 0])
        return weights
