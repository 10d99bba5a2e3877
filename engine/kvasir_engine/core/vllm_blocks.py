"""vLLM's KV events as names of blocks: what a vLLM server holds, in the words of routers.

vLLM names blocks by hashes of its own and tells, of each that it stores, its tokens and the block
before it. From those follow Kvasir's names. A block whose beginning is not known (its parent's
event was missed; its tenant's salt is not told; it holds more than tokens) has no name.

Invariant: a name is told as stored only when vLLM told of the whole prefix, and at most once until
it is removed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvasir_kvstore.core import block

BLOCK_HASH = int | bytes
MEDIA = (None, "GPU")
"""Where blocks are that serve at once; a copy elsewhere is not counted."""

SALTS_MAX = 4_096


class EventFormatError(Exception):
    """An event is not one of vLLM's, or its blocks cannot be named."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks that follow one another."""

    hashes: Sequence[BLOCK_HASH]
    parent: BLOCK_HASH | None
    token_ids: Sequence[int]
    block_tokens: int
    extra_keys: Sequence[Sequence[Any] | None]
    """What beside tokens decides each block; empty: nothing, or vLLM is too old to tell."""


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks that are gone."""

    hashes: Sequence[BLOCK_HASH]


@dataclass(frozen=True, slots=True)
class Cleared:
    """All blocks are gone."""


Event = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class Change:
    """What routers are told."""

    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()


class VllmBlocks:
    """The blocks of one vLLM server; as many as it holds itself."""

    def __init__(self, fingerprint: bytes) -> None:
        self._fingerprint = fingerprint
        self._names: dict[BLOCK_HASH, tuple[bytes, ...]] = {}
        self._salts: dict[str, bytes] = {}  # as vLLM is told them
        self._tells_salts = False

    @property
    def are_whole(self) -> bool:
        """Whether vLLM tells enough to name its blocks: an old one keeps salts to itself."""
        return self._tells_salts or not self._salts

    def salted(self, salt: bytes) -> None:
        """A tenant's request goes to vLLM; its blocks may be told of."""
        if salt and len(self._salts) < SALTS_MAX:
            self._salts[salt.hex()] = salt

    def apply(self, event: Event) -> Change:
        """What an event changes.

        Raises:
            EventFormatError: its blocks cannot be named.
        """
        match event:
            case Stored():
                return Change(stored=self._store(event))
            case Removed():
                gone = [name for key in event.hashes for name in self._names.pop(key, ())]
                return Change(removed=tuple(gone))
            case Cleared():
                gone = list(self.names())
                self.forget()
                return Change(removed=tuple(gone))

    def names(self) -> tuple[bytes, ...]:
        """All names, parents before children."""
        return tuple(name for names in self._names.values() for name in names)

    def forget(self) -> None:
        """Nothing is known any more."""
        self._names.clear()

    def _store(self, event: Stored) -> tuple[bytes, ...]:
        size = event.block_tokens
        if size <= 0 or size % block.BLOCK_TOKENS:
            raise EventFormatError(
                f"vLLM's blocks have {size} tokens: a multiple of {block.BLOCK_TOKENS} is needed "
                f"(--block-size {block.BLOCK_TOKENS})"
            )
        if len(event.token_ids) != size * len(event.hashes):
            raise EventFormatError("an event has more or fewer tokens than its blocks")
        self._tells_salts |= bool(event.extra_keys)
        stored: list[bytes] = []
        parent = self._parent(event)
        for index, key in enumerate(event.hashes):
            if parent is None or (index and _extra(event, index)):
                break
            tokens = event.token_ids[index * size : (index + 1) * size]
            names = tuple(block.chain(parent, tokens))
            if key not in self._names:
                self._names[key] = names
                stored += names
            parent = names[-1]
        return tuple(stored)

    def _parent(self, event: Stored) -> bytes | None:
        """The name before the first block; None: it is not known."""
        extra = _extra(event, 0)
        if event.parent is not None:
            known = self._names.get(event.parent)
            return known[-1] if known and not extra else None
        if not extra:  # vLLM tells a salt with the first block only
            return block.root(self._fingerprint)
        salt = self._salts.get(extra[0]) if len(extra) == 1 else None
        return None if salt is None else block.root(self._fingerprint, salt)


def _extra(event: Stored, index: int) -> Sequence[Any]:
    """What beside tokens decides a block."""
    return (event.extra_keys[index] or ()) if index < len(event.extra_keys) else ()


def events_of(batch: Any) -> list[Event]:
    """The events of a decoded batch, in either of vLLM's forms: arrays, or objects with a `type`.

    Raises:
        EventFormatError: it is neither.
    """
    try:
        entries = batch["events"] if isinstance(batch, dict) else batch[1]
        found = [_event(entry) for entry in entries]
    except (LookupError, TypeError) as error:
        raise EventFormatError(f"not a batch of vLLM's events: {error!r}") from error
    return [event for event in found if event is not None]


ARRAYS = {
    "BlockStored": (
        *("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id"),
        *("medium", "lora_name", "extra_keys", "group_idx"),
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}


def _event(entry: Any) -> Event | None:
    """One event; None: it is about blocks that are not counted."""
    if not isinstance(entry, dict):
        kind, *values = entry
        entry = {"type": kind, **dict(zip(ARRAYS[kind], values, strict=False))}
    make: Callable[[dict[str, Any]], Event] = MAKERS[entry["type"]]
    is_counted = entry.get("medium") in MEDIA and not entry.get("group_idx")
    is_counted = is_counted and entry.get("lora_id") is None and not entry.get("lora_name")
    return make(entry) if is_counted else None


def _stored(entry: dict[str, Any]) -> Event:
    return Stored(
        hashes=entry["block_hashes"],
        parent=entry["parent_block_hash"],
        token_ids=entry["token_ids"],
        block_tokens=entry["block_size"],
        extra_keys=entry.get("extra_keys") or (),
    )


MAKERS: dict[str, Callable[[dict[str, Any]], Event]] = {
    "BlockStored": _stored,
    "BlockRemoved": lambda entry: Removed(entry["block_hashes"]),
    "AllBlocksCleared": lambda entry: Cleared(),
}
