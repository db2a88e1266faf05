"""A model of one parameter whose loader is given, for every idiom that loaders use."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

SHAPE = (4, 6)
Loader = Callable[["Toy", torch.Tensor], None]


class Toy(torch.nn.Module):
    """``weight`` goes to meta, ``bias`` and ``twin`` (in one storage) stay live, ``table`` is a buffer, ``plain`` is neither."""

    def __init__(self, loader: Loader) -> None:
        super().__init__()
        both = torch.arange(12.0)
        self.weight = torch.nn.Parameter(torch.zeros(SHAPE), requires_grad=False)
        self.bias = torch.nn.Parameter(both[6:], requires_grad=False)
        self.register_buffer("e_score_correction_bias", both[:6], persistent=False)
        self.register_buffer("table", torch.zeros(6))
        self.register_buffer("untouched", torch.zeros(6))
        self.expert_map = torch.tensor([3, 1, 2, 0])
        self.plain = torch.zeros(SHAPE)
        self.loader = loader
        record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name != "hf":
                raise KeyError(name)
            self.loader(self, tensor)


def _chunks(toy: Toy, hf: torch.Tensor) -> None:
    for here, there in zip(toy.weight.data.chunk(3), hf.chunk(3), strict=True):
        here.copy_(there)


def _mapped(toy: Toy, hf: torch.Tensor) -> None:
    for row in range(4):
        toy.weight.data[toy.expert_map[row].item()].copy_(hf[row])


def _by_parts_of_a_clone(toy: Toy, hf: torch.Tensor) -> None:
    clone = hf.t().clone(memory_format=torch.contiguous_format)
    for column in range(6):
        toy.weight.data[:, column].copy_(clone.view(-1)[4 * column : 4 * column + 4])


def _all_tables(toy: Toy, hf: torch.Tensor) -> None:
    toy.weight.data.copy_(hf)
    toy.bias.data.copy_(hf[0])
    toy.e_score_correction_bias[2:].copy_(hf[1, 2:])
    toy.e_score_correction_bias[:2].fill_(3.0)
    toy.table.copy_(hf[2])


def _rows(toy: Toy, hf: torch.Tensor) -> None:
    toy.weight.data.fill_(torch.tensor(5.0))
    toy.weight.data[1:3] = hf[2:]


def _numbers_around_a_row(toy: Toy, hf: torch.Tensor) -> None:
    # Python's number becomes a tensor without memory before the loader's write is seen.
    toy.weight.data[:] = 5.0
    toy.weight.data[1] = hf[2]


def _part_of_a_stack(toy: Toy, hf: torch.Tensor) -> None:
    toy.weight.data[:] = 0
    toy.weight.data[1:, 2:5].copy_(torch.stack(list(hf))[:3, 3:])


# The elements of the parameter are elements of the HF tensor: each must come out with the loader's own bits.
COPIES: dict[str, Loader] = {
    "copy": lambda toy, hf: toy.weight.data.copy_(hf),
    "the parameter itself": lambda toy, hf: toy.weight.copy_(hf),
    "detached": lambda toy, hf: toy.weight.detach().copy_(hf.detach()),
    "clone": lambda toy, hf: toy.weight.data.copy_(hf.clone()),
    "clone that keeps a transpose": lambda toy, hf: toy.weight.data.t().copy_(hf.t().clone()),
    "contiguous transpose": lambda toy, hf: toy.weight.data.copy_(hf.t().contiguous().t()),
    "reshape of a transpose": lambda toy, hf: toy.weight.data.copy_(hf.t().reshape(24).view(6, 4).t()),
    "parts of a clone": _by_parts_of_a_clone,
    "wider and back": lambda toy, hf: toy.weight.data.copy_(hf.double().float()),
    "to a device": lambda toy, hf: toy.weight.data.copy_(hf.to("cpu", copy=True)),
    "flat": lambda toy, hf: toy.weight.data.view(-1).copy_(hf.flatten()),
    "chunks": _chunks,
    "rows by a live map": _mapped,
    "one row for all": lambda toy, hf: toy.weight.data.copy_(hf[1:2].expand(SHAPE)),
    "one element for all": lambda toy, hf: toy.weight.data.fill_(hf[2, 3]),
    "foreach": lambda toy, hf: torch._foreach_copy_([toy.weight.data], [hf]),
    "assigned rows": _rows,
    "assigned numbers": _numbers_around_a_row,
    "stack": lambda toy, hf: toy.weight.data.copy_(torch.stack(list(hf))),
    "part of a stack": _part_of_a_stack,
    "every table": _all_tables,
    "an unsqueezed shape": lambda toy, hf: toy.weight.data.unsqueeze(0).copy_(hf),
}


def _halves(toy: Toy, hf: torch.Tensor) -> None:
    toy.weight.data.copy_(torch.cat([hf[2:], hf[:2]]))


def _changed_later(toy: Toy, hf: torch.Tensor) -> None:
    toy.weight.data.copy_(hf)
    toy.weight.data.mul_(2)


def _through_memory_of_its_own(toy: Toy, hf: torch.Tensor) -> None:
    scratch = torch.empty(SHAPE)
    scratch.copy_(hf)
    toy.weight.data.copy_(scratch)


def _exchanged(toy: Toy, hf: torch.Tensor) -> None:
    toy.weight.data = hf.clone()


def _exchanged_after_a_row(toy: Toy, hf: torch.Tensor) -> None:
    toy.table.copy_(hf[1])
    toy.weight.data = hf.clone()


def _flipped_after_a_row(toy: Toy, hf: torch.Tensor) -> None:
    toy.table.copy_(hf[1])
    toy.weight.data.copy_(hf.flip(0))


def _live_exchanged(toy: Toy, hf: torch.Tensor) -> None:
    toy.weight.data.copy_(hf)
    toy.bias.data = torch.ones(6)


def _changed_source(toy: Toy, hf: torch.Tensor) -> None:
    hf.mul_(2)
    toy.weight.data.copy_(hf)


def _number_changed_since(toy: Toy, hf: torch.Tensor) -> None:
    number = torch.scalar_tensor(3.0)
    number.mul_(2)
    toy.weight.data.copy_(number.expand(SHAPE))


# The buffer of each must be a finding; of a live one the values must stay.
COMPUTED: dict[str, tuple[str, Loader]] = {
    "sum": ("weight", lambda toy, hf: toy.weight.data.copy_(hf + 1)),
    "cat": ("weight", _halves),
    "stack along another dim": ("weight", lambda toy, hf: toy.weight.data.copy_(torch.stack(list(hf.t()), dim=1))),
    "exp": ("weight", lambda toy, hf: toy.weight.data.copy_(-torch.exp(hf.float()))),
    "changed later": ("weight", _changed_later),
    "changed source": ("weight", _changed_source),
    "number changed since": ("weight", _number_changed_since),
    "rounded": ("weight", lambda toy, hf: toy.weight.data.copy_(hf.bfloat16())),
    "bits": ("weight", lambda toy, hf: toy.weight.data.view(torch.int32).copy_(hf.view(torch.int32))),
    "memory of its own": ("weight", _through_memory_of_its_own),
    "memory exchanged": ("weight", _exchanged),
    "memory exchanged after a row": ("weight", _exchanged_after_a_row),
    "flipped after a row": ("weight", _flipped_after_a_row),
    "live memory exchanged": ("bias", _live_exchanged),
    "live in place": ("bias", lambda toy, hf: toy.bias.data.add_(hf[0])),
    "live by index": ("bias", lambda toy, hf: toy.bias.data.index_copy_(0, torch.arange(6), hf[0])),
    "out of another parameter": ("weight", lambda toy, hf: toy.weight.data.copy_(toy.bias.data.expand(SHAPE))),
}
