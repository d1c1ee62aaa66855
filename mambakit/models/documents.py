"""Where documents begin in a batch, from any of the arguments in which collators mark it.

- ``position_ids`` (b, l): positions that restart;
- ``seq_idx`` (b, l): the document of each token (transformers' DataCollatorWithFlattening, TRL, causal_conv1d);
- ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (s + 1,): cumulative lengths over all b * l tokens (flash attention).
  Attention has one for queries and one for keys; here both must be equal;
- ``max_length_q`` and ``max_length_k``: the length of the longest document;
- ``attention_mask`` (b, l) with values above 1: 0 is padding, other values are documents;
- ``cu_seqlens`` (s + 1,): cumulative lengths over one row; with a state, sequence i continues slot i.

Each marks the tokens that begin a document. Where several are given they must agree.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.modules.packing import document_starts
from mambakit.modules.tracing import values_are_hidden

_ONLY_A_MASK = (
    "attention_mask has other values than 0 and 1, and this program was traced for padding alone; give cu_seqlens"
)


class Marks(NamedTuple):
    """The arguments of a forward that mark documents: tensors, arrays or lists."""

    position_ids: Any = None
    cu_seqlens: Any = None
    seq_idx: Any = None
    cu_seq_lens_q: Any = None
    cu_seq_lens_k: Any = None
    max_length_q: Any = None
    max_length_k: Any = None


def given_marks(marks: Marks) -> dict[str, Any]:
    """Those that are not None, by name. A function: torch.compile of torch 2.9 traces no property of a named tuple."""
    return {name: value for name, value in zip(Marks._fields, marks, strict=True) if value is not None}


class Documents(NamedTuple):
    """The documents of a (b, l) batch.

    Attributes:
        keep: (b, l) bool, the real tokens; None when all are. starts: (b, l) bool, the tokens that begin a document;
        None where nothing marks documents. A row's first token is among them only where it is marked (position 0).
    """

    keep: Tensor | None
    starts: Tensor | None


def documents_of(
    shape: tuple[int, int], device: torch.device, attention_mask: Any, marks: Marks, seen: int = 0, check: bool = True
) -> Documents:
    """The documents that a mask and marks describe.

    Args:
        seen: tokens of each row that are in the state already. Arguments with a column for each token may cover them.
        check: raise where values are impossible or disagree. This waits for the device.

    Raises:
        ValueError: a wrong shape or value, or two marks that disagree.
    """
    visible = not values_are_hidden(attention_mask, *marks)
    check = check and visible
    length = shape[1]
    found: dict[str, Tensor] = {}
    wide_keep = keep = None
    if attention_mask is not None:
        mask = _columns("attention_mask", attention_mask, shape, seen, device)
        wide_keep = mask.bool() if visible or mask.dtype == torch.bool else _only_a_mask(mask)
        keep = _last(wide_keep, length)
        if visible and mask.dtype != torch.bool and _numbers_documents(mask):
            found["attention_mask"] = _last(_changes(mask, wide_keep), length)
    if marks.position_ids is not None:
        positions = _last(_columns("position_ids", marks.position_ids, shape, seen, device), length)
        found["position_ids"] = document_starts(positions, keep)
        if seen == 0:
            found["position_ids"][:, :1] = False  # the first token has nothing to be cut from
    if marks.seq_idx is not None:
        idx = _columns("seq_idx", marks.seq_idx, shape, seen, device)
        if check and bool(_real(idx < 0, _as_wide(wide_keep, idx)).any()):
            raise ValueError("seq_idx is negative at a token that attention_mask keeps; mark padding by attention_mask")
        found["seq_idx"] = _last(_changes(idx, _as_wide(wide_keep, idx)), length)
    for name in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k"):
        if (cu := getattr(marks, name)) is not None:
            starts = _starts_of_lengths(name, cu, shape, device, check)
            found[name] = _changes(starts.flatten().cumsum(0).view(shape), keep)
    if check:
        _require_agreement(found, keep)
        _require_lengths(marks, next(iter(found.values()), None), keep, shape)
    return Documents(keep, found.get("position_ids", next(iter(found.values()), None)))


def as_lengths(name: str, cu: Any, device: torch.device | None = None) -> Tensor:
    """Cumulative lengths as a tensor (s + 1,) int32."""
    if device is None:  # where it is: torch's default device may be another one
        device = cu.device if isinstance(cu, Tensor) else torch.device("cpu")
    cu = torch.as_tensor(cu, device=device)
    if cu.dim() != 1 or cu.numel() < 2 or cu.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {tuple(cu.shape)} {cu.dtype}, expected (s + 1,) int32 with s >= 1")
    return cu.to(torch.int32)


def require_cumulative(name: str, cu: Tensor, shape: tuple[int, int]) -> None:
    """ValueError unless ``cu`` divides the b * l tokens of a batch into sequences, each within a row."""
    b, length = shape
    values = cu.tolist()
    if values[0] != 0 or values[-1] != b * length or values != sorted(values):
        raise ValueError(f"{name} must rise from 0 to the packed length {b * length}, got {_short(values)}")
    across = sorted(set(range(0, b * length, length or 1)) - set(values))
    if across:
        raise ValueError(
            f"{name}: a sequence goes from one row of the batch into the next at token {across[0]}; rows are apart, "
            f"flatten the batch to (1, {b * length})"
        )


def _starts_of_lengths(name: str, cu: Any, shape: tuple[int, int], device: torch.device, check: bool) -> Tensor:
    """(b, l) bool: the tokens at which a sequence of the b * l flattened ones begins."""
    b, length = shape
    cu = as_lengths(name, cu)
    if check:
        require_cumulative(name, cu, shape)
    # Sequences without a token may begin where the row ends: one place more.
    starts = torch.zeros(b * length + 1, dtype=torch.bool, device=device)
    return starts.index_fill(0, cu[:-1].long().to(device), True)[:-1].view(shape)


def _columns(name: str, given: Any, shape: tuple[int, int], seen: int, device: torch.device) -> Tensor:
    """``given`` as a tensor (b, l) or (b, seen + l); one row is repeated for all."""
    b, length = shape
    tensor = torch.as_tensor(given, device=device)
    if name != "attention_mask" and tensor.dim() in (1, 2) and tensor.shape[:-1] in ((), (1,)):
        tensor = tensor.expand(b, -1)
    if tensor.dim() != 2 or tensor.shape[0] != b or tensor.shape[1] not in (length, seen + length):
        also = f", or {(b, seen + length)} with the tokens already in the state" if seen else ""
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {(b, length)}{also}")
    return tensor


def _last(tensor: Tensor, columns: int) -> Tensor:
    return tensor[:, tensor.shape[1] - columns :]


def _numbers_documents(mask: Tensor) -> bool:
    """Whether the mask numbers documents, with values above 1."""
    if mask.numel() == 0:
        return False
    least, most = torch.stack(torch.aminmax(mask)).tolist()
    whole = not mask.is_floating_point() or bool((mask == mask.round()).all())
    if least < 0 or not whole:
        raise ValueError(
            f"attention_mask has values from {least} to {most}; give 1 for a token and 0 for padding (or the number of "
            "each token's document), not what is added to attention scores"
        )
    return most > 1


def _only_a_mask(mask: Tensor) -> Tensor:
    """``mask`` as bool. A traced program checks at each call that its values are 0 and 1."""
    sound = ((mask == 0) | (mask == 1)).all()
    # jit's dead code elimination would remove an assertion whose result nothing uses.
    if torch.jit.is_tracing() and mask.device.type == "cpu":
        token = torch.ops.aten._functional_assert_async.msg(sound, _ONLY_A_MASK, torch.ones_like(sound))
        return mask.bool() & token
    torch._assert_async(sound, _ONLY_A_MASK)
    return mask.bool()


def _as_wide(keep: Tensor | None, like: Tensor) -> Tensor | None:
    """``keep`` with as many columns as ``like``; tokens in columns that only ``like`` has are real."""
    if keep is None or keep.shape == like.shape:
        return keep
    if keep.shape[1] > like.shape[1]:
        return keep[:, -like.shape[1] :]
    return torch.nn.functional.pad(keep, (like.shape[1] - keep.shape[1], 0), value=True)


def _real(tokens: Tensor, keep: Tensor | None) -> Tensor:
    return tokens if keep is None else tokens & keep


def _changes(ids: Tensor, keep: Tensor | None) -> Tensor:
    """(b, l) bool: real tokens with another id than the real token before them; a row's first one is none."""
    starts = torch.zeros_like(ids, dtype=torch.bool)
    if keep is None:
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        return starts
    columns = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device).expand_as(ids)
    last = torch.where(keep, columns, -1).cummax(1).values[:, :-1]  # the last real column up to each
    before = ids.gather(1, last.clamp(min=0))
    starts[:, 1:] = keep[:, 1:] & (last >= 0) & (ids[:, 1:] != before)
    return starts


def begin_inside(starts: Tensor, keep: Tensor | None) -> Tensor:
    """``starts`` without each row's first real token: where a document follows another one in its row."""
    if keep is None:
        return torch.cat([torch.zeros_like(starts[:, :1]), starts[:, 1:]], 1)
    return starts & keep & (keep.cumsum(1) > 1)


def _require_agreement(found: dict[str, Tensor], keep: Tensor | None) -> None:
    if len(found) < 2:
        return
    (first, reference), *others = found.items()
    differs = torch.stack([begin_inside(reference, keep) != begin_inside(starts, keep) for _, starts in others])
    if not bool(differs.any()):
        return
    which, row, column = differs.nonzero()[0].tolist()
    raise ValueError(
        f"{first} and {others[which][0]} mark different documents: only one of them has one begin at row {row}, token "
        f"{column}; drop the one that is wrong"
    )


def _require_lengths(marks: Marks, starts: Tensor | None, keep: Tensor | None, shape: tuple[int, int]) -> None:
    given = {
        name: int(given_marks(marks)[name]) for name in ("max_length_q", "max_length_k") if name in given_marks(marks)
    }
    if not given or shape[0] * shape[1] == 0:
        return
    if len(set(given.values())) > 1:
        raise ValueError(
            f"max_length_q is {marks.max_length_q} and max_length_k {marks.max_length_k}; they are of one text"
        )
    real = torch.ones(shape, dtype=torch.bool, device="cpu") if keep is None else keep.cpu()
    inner = (
        torch.zeros(shape, dtype=torch.bool, device="cpu")
        if starts is None
        else begin_inside(starts.cpu(), keep if keep is None else real)
    )
    rows = torch.arange(shape[0], dtype=torch.int64, device="cpu")[:, None] * shape[1]
    longest = int(torch.bincount((rows + inner.cumsum(1))[real]).max()) if bool(real.any()) else 0
    name, most = next(iter(given.items()))
    if longest > most:
        raise ValueError(
            f"{name} is {most}, but a document has {longest} tokens; say where documents begin, or correct it"
        )


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 16 else f"[{', '.join(map(str, values[:8]))}, ..., {values[-1]}]"
