"""How the files of a checkpoint hold a model's tensors: under which names, and experts one by one or stacked. Integers and names.

The tables name the tensors of every expert. transformers 5 keeps those of a layer in two tensors, and some checkpoints are saved so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlsync.errors import PlacementError, first_few
from rlsync.layout.geometry import Box, BufferSpec, Piece, Placement, TensorSpec, contiguous_strides
from rlsync.models.stacks import Bound, Model, Orientation, Spelling, Stacked

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor of the files, by its name and shape there, and where the tensors of the table lie in it."""

    spec: TensorSpec
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class StoredForm:
    """How one checkpoint holds the tensors of its model.

    Attributes:
        spelling: of the beginnings of names.
        experts: how an expert's matrices lie in the stacked tensors of its layer; None where every expert has tensors of its own.
    """

    spelling: Spelling = Spelling()
    experts: Orientation | None = None

    def file_tensors(self, model: Model, tensors: Sequence[TensorSpec]) -> tuple[FileTensor, ...]:
        """The tensors of the files that hold ``tensors`` of the table, in their order; dtypes are those of ``tensors``."""
        stacked = {} if self.experts is None else {name: place for bound in _experts(model) for name, place in self._places(bound)}
        renamed = () if self.experts is None else tuple(pair for form in _forms(model) for pair in form.renamed)
        specs: dict[str, TensorSpec] = {}
        pieces: dict[str, list[Piece]] = {}
        for tensor in tensors:
            name, shape, offset, strides = stacked.get(tensor.name, (tensor.name, tensor.shape, 0, contiguous_strides(tensor.shape)))
            for before, after in renamed:
                name = name.replace(before, after)
            name = self.spelling.stored(name)
            specs.setdefault(name, TensorSpec(name, tensor.dtype, shape))
            pieces.setdefault(name, []).append(Piece(tensor.name, Box.whole(tensor.shape), name, offset, strides))
        return tuple(FileTensor(spec, tuple(pieces[name])) for name, spec in specs.items())

    def _places(self, bound: Bound) -> Iterator[tuple[str, tuple[str, tuple[int, ...], int, tuple[int, ...]]]]:
        """Of each HF tensor of an expert's parameter: the stacked tensor, its shape, and offset and strides in it."""
        stacked, shape = stacked_tensor(bound, self.experts)
        rows, columns = _matrix(bound)
        first = bound.numbers[-1] * rows * columns
        for name, (own_rows, _) in bound.hf:
            yield name, (stacked, shape, first, (columns, 1) if self.experts == "rows" else (1, rows))
            first += own_rows * (columns if self.experts == "rows" else 1)


def file_placement(holder: str, files: Sequence[FileTensor]) -> Placement:
    """Tensors of files as what one holder has; buffers are called as in the files."""
    buffers = tuple(BufferSpec(file.spec.name, file.spec.dtype, file.spec.shape) for file in files)
    return Placement(holder, buffers, tuple(piece for file in files for piece in file.pieces))


def has_other_forms(model: Model) -> bool:
    """Whether files of a family hold its tensors in several forms, which their names and shapes tell."""
    return bool(model.family.spellings or _forms(model))


def default_form(model: Model) -> StoredForm:
    """How released checkpoints of a family hold their tensors."""
    return StoredForm(experts=next((form.released for form in _forms(model)), None))


def form_of(model: Model, shapes: Shapes) -> StoredForm:
    """How files with tensors of these names and shapes hold the tensors of a model.

    Raises PlacementError where names are spelled in two ways, where experts are stacked and lie one by one as well, and where the shapes
    of stacked experts do not tell their rows from their columns.
    """
    spelling = model.spelling(shapes)
    found = [(bound, name) for bound in _experts(model) if (name := spelling.stored(stacked_tensor(bound, None)[0])) in shapes]
    if not found:
        return StoredForm(spelling)
    single = next((name for bound in _experts(model) for name, _ in bound.hf if spelling.stored(name) in shapes), None)
    if single is not None:
        raise PlacementError(f"experts are stacked in {found[0][1]}, and {spelling.stored(single)} is there as well; remove one of them")
    possible = _forms(model)[0].orientations
    return StoredForm(spelling, possible[0] if len(possible) == 1 else _orientation(found, shapes))


def _orientation(found: Sequence[tuple[Bound, str]], shapes: Shapes) -> Orientation:
    for bound, name in found:
        rows, columns = _matrix(bound)
        if rows == columns:
            raise PlacementError(
                f"{name} {shapes[name]}: an expert's matrix is square, so its shape does not tell rows from columns, and files of this "
                "family exist in both ways; save the checkpoint with a tensor for each expert"
            )
    bound, name = found[0]
    rows, columns = _matrix(bound)
    return "rows" if shapes[name][1:] == (rows, columns) else "columns"


def misfits(model: Model, shapes: Shapes) -> list[str]:
    """What keeps tensors of these shapes, by name in their files, from being a model's: missing, unexpected, wrongly shaped ones."""
    try:
        form = form_of(model, shapes)
    except PlacementError as error:
        return [str(error)]
    wanted = {file.spec.name: file.spec.shape for file in form.file_tensors(model, model.tensors())}
    unread = {name for name in shapes if name not in wanted and (model.is_ignored(name) or model.is_kept(name))}
    return differences(wanted, {name: shape for name, shape in shapes.items() if name not in unread})


def differences(wanted: Shapes, found: Shapes) -> list[str]:
    """Tensors by name that are missing, unexpected or wrongly shaped among the found ones: a sentence for each kind."""
    missing = sorted(name for name in wanted if name not in found)
    extra = sorted(name for name in found if name not in wanted)
    wrong = [f"{name}: expected {shape}, stored {found[name]}" for name, shape in wanted.items() if found.get(name, shape) != shape]
    kinds = (("missing", missing), ("unexpected", extra), ("wrongly shaped", wrong))
    return [f"{kind} {len(names)} tensors: {first_few(names)}" for kind, names in kinds if names]


def _forms(model: Model) -> list[Stacked]:
    return [stack.stacked for stack in model.family.stacks if stack.stacked is not None]


def _experts(model: Model) -> Iterator[Bound]:
    """Parameters of single experts, of which there may be stacked tensors."""
    return (bound for bound in model.parameters() if bound.stack.stacked is not None)


def _matrix(bound: Bound) -> tuple[int, int]:
    """Rows and columns of an expert's parameter."""
    return sum(shape[0] for _, shape in bound.hf), bound.hf[0][1][1]


def stacked_tensor(bound: Bound, orientation: Orientation | None) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the tensor that has an expert's parameter, and those of all other experts of its layer. Of a stack with such a
    form."""
    form = bound.stack.stacked
    assert form is not None
    number = bound.stack.rules.index(bound.rule)
    layer = dict(zip((index.name for index in bound.stack.indices), bound.numbers, strict=True))
    rows, columns = _matrix(bound)
    shape = (bound.copies, columns, rows) if orientation == "columns" else (bound.copies, rows, columns)
    return form.tensors[number].format(**layer), shape
