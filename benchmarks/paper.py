"""Plans of the size of real models, on paper: dense ones by the tables, and a mixture of experts by hand on both sides.

For tests and benches that need the shapes and none of the bytes. A sync records what live workers hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from rlsync.cli.shapes import SHAPES
from rlsync.layout.geometry import Box, BufferSpec, Location, Padding, Piece, Placement, TensorSpec, contiguous_strides
from rlsync.layout.topology import Topology
from rlsync.models import model_of
from rlsync.models.paper import paper_worker
from rlsync.models.placement import megatron_placements

VOCAB_MULTIPLE = 64
GPUS_PER_HOST = 8

QWEN25_05B: Mapping[str, Any] = SHAPES["qwen2.5-0.5b"]
QWEN25_7B: Mapping[str, Any] = SHAPES["qwen2.5-7b"]
QWEN25_72B: Mapping[str, Any] = SHAPES["qwen2.5-72b"]


@dataclass(slots=True)
class Shelf:
    """Collects the buffers of one holder; pieces are stacked along dim 0 of a buffer."""

    holder: str
    dtype: str
    location: Location | None = None
    buffers: list[BufferSpec] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    padding: list[Padding] = field(default_factory=list)

    def put(self, buffer: str, parts: Sequence[tuple[str, Box]], *, padded_rows: int = 0) -> None:
        """A buffer of boxes one below the other, and ``padded_rows`` rows of zeros."""
        tail = parts[0][1].shape[1:]
        row = contiguous_strides((1, *tail))[0]
        rows = 0
        for tensor, box in parts:
            self.pieces.append(Piece(tensor, box, buffer, rows * row, contiguous_strides(box.shape)))
            rows += box.shape[0]
        if padded_rows:
            shape = (padded_rows, *tail)
            self.padding.append(Padding(buffer, rows * row, shape, contiguous_strides(shape)))
        self.buffers.append(BufferSpec(buffer, self.dtype, (rows + padded_rows, *tail)))

    def stack(self, buffer: str, layers: Sequence[Sequence[tuple[str, Box]]]) -> None:
        """A 3-D buffer: each layer is a matrix of boxes one below the other."""
        rows, columns = sum(box.shape[0] for _, box in layers[0]), layers[0][0][1].shape[1]
        for index, parts in enumerate(layers):
            row = 0
            for tensor, box in parts:
                self.pieces.append(Piece(tensor, box, buffer, (index * rows + row) * columns, (columns, 1)))
                row += box.shape[0]
        self.buffers.append(BufferSpec(buffer, self.dtype, (len(layers), rows, columns)))

    def placement(self) -> Placement:
        return Placement(self.holder, tuple(self.buffers), tuple(self.pieces), tuple(self.padding), self.location)


def chunk(shape: Sequence[int], dim: int, rank: int, size: int) -> Box:
    """The ``rank``-th of ``size`` equal chunks of a tensor along a dim."""
    assert shape[dim] % size == 0, (shape, dim, size)
    step = shape[dim] // size
    start = tuple(rank * step if d == dim else 0 for d in range(len(shape)))
    return Box(start, tuple(a + (step if d == dim else n) for d, (a, n) in enumerate(zip(start, shape, strict=True))))


def place(index: int) -> Location:
    """GPU ``index`` of a run with GPUS_PER_HOST to a host."""
    return Location(f"host {index // GPUS_PER_HOST}", f"gpu {index % GPUS_PER_HOST}")


def _vocabulary(shelf: Shelf, name: str, shape: tuple[int, int], tp_rank: int, tp_size: int) -> None:
    rows = -(-shape[0] // VOCAB_MULTIPLE) * VOCAB_MULTIPLE // tp_size
    begin, end = min(tp_rank * rows, shape[0]), min((tp_rank + 1) * rows, shape[0])
    shelf.put(name, [(name, Box((begin, 0), (end, shape[1])))], padded_rows=rows - (end - begin))


def _attention(shelf: Shelf, shapes: Mapping[str, tuple[int, ...]], layer: str, num_groups: int, tp_rank: int, tp_size: int) -> None:
    """qkv_proj: this rank's query heads, then its key and its value heads, which ranks share where there are fewer than ranks."""
    kv_size = min(tp_size, num_groups)
    kv_rank = tp_rank * kv_size // tp_size
    q, k, v, output = (f"{layer}.self_attn.{x}_proj.weight" for x in "qkvo")
    fused = [(q, chunk(shapes[q], 0, tp_rank, tp_size)), *((x, chunk(shapes[x], 0, kv_rank, kv_size)) for x in (k, v))]
    shelf.put(f"{layer}.self_attn.qkv_proj.weight", fused)
    shelf.put(output, [(output, chunk(shapes[output], 1, tp_rank, tp_size))])


def _whole(shelf: Shelf, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    if name in shapes:
        shelf.put(name, [(name, Box.whole(shapes[name]))])


@dataclass(frozen=True, slots=True)
class Case:
    """Both sides of a plan."""

    tensors: tuple[TensorSpec, ...]
    sources: tuple[Placement, ...]
    destinations: tuple[Placement, ...]


def dense_case(config: Mapping[str, Any], topology: Topology, *, num_engines: int, engine_tp: int, colocated: bool = True) -> Case:
    """Actor ranks and ``num_engines`` engines of a dense model, on the same GPUs or on other hosts."""
    model = model_of(config)
    actors = megatron_placements(model, topology)
    first_gpu = 0 if colocated else -(-topology.world_size // GPUS_PER_HOST) * GPUS_PER_HOST
    workers = [
        paper_worker(model, rank, engine_tp, holder=f"engine {e} worker {rank}", location=place(first_gpu + e * engine_tp + rank))
        for e in range(num_engines)
        for rank in range(engine_tp)
    ]
    located = [replace(p, location=place(i)) for i, p in enumerate(actors)]
    return Case(model.tensors(), tuple(located), tuple(workers))


@dataclass(frozen=True, slots=True)
class Experts:
    """Sizes of a mixture of experts with plain attention."""

    num_layers: int
    num_experts: int
    hidden: int
    moe_ffn: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab: int

    def tensors(self) -> Iterator[TensorSpec]:
        """Every HF tensor in layer order."""

        def spec(name: str, *shape: int) -> TensorSpec:
            return TensorSpec(name, "bfloat16", shape)

        yield spec("model.embed_tokens.weight", self.vocab, self.hidden)
        for i in range(self.num_layers):
            layer, q, kv = f"model.layers.{i}", self.num_heads * self.head_dim, self.num_groups * self.head_dim
            yield spec(f"{layer}.input_layernorm.weight", self.hidden)
            for x, rows in (("q", q), ("k", kv), ("v", kv)):
                yield spec(f"{layer}.self_attn.{x}_proj.weight", rows, self.hidden)
            yield spec(f"{layer}.self_attn.o_proj.weight", self.hidden, q)
            yield spec(f"{layer}.post_attention_layernorm.weight", self.hidden)
            yield spec(f"{layer}.mlp.gate.weight", self.num_experts, self.hidden)
            for e in range(self.num_experts):
                expert = f"{layer}.mlp.experts.{e}"
                yield spec(f"{expert}.gate_proj.weight", self.moe_ffn, self.hidden)
                yield spec(f"{expert}.up_proj.weight", self.moe_ffn, self.hidden)
                yield spec(f"{expert}.down_proj.weight", self.hidden, self.moe_ffn)
        yield spec("model.norm.weight", self.hidden)
        yield spec("lm_head.weight", self.vocab, self.hidden)

    def actor(self, rank: int, ep_size: int, pp_size: int, world_size: int) -> Placement:
        """A rank with TP=1: attention whole, a share of the experts, each under a name of its own; a stage of the layers."""
        per_stage = world_size // pp_size
        stage, ep_rank = rank // per_stage, rank % per_stage % ep_size
        shapes = _shapes(self)
        shelf = Shelf(f"actor {rank}", "bfloat16", place(rank))
        step, held = self.num_layers // pp_size, self.num_experts // ep_size
        for name in (*(["model.embed_tokens.weight"] if stage == 0 else []), *(_HEAD if stage == pp_size - 1 else [])):
            _whole(shelf, shapes, name)
        for i in range(stage * step, (stage + 1) * step):
            layer = f"model.layers.{i}"
            for name in (n for n in _SMALL if f"{layer}.{n}.weight" in shapes):
                _whole(shelf, shapes, f"{layer}.{name}.weight")
            for e in range(ep_rank * held, (ep_rank + 1) * held):
                expert = f"{layer}.mlp.experts.{e}"
                fc1 = [(f"{expert}.{x}_proj.weight", Box.whole((self.moe_ffn, self.hidden))) for x in ("gate", "up")]
                shelf.put(f"{expert}.linear_fc1.weight", fc1)
                _whole(shelf, shapes, f"{expert}.down_proj.weight")
        return shelf.placement()

    def worker(self, tp_rank: int, tp_size: int, holder: str, location: Location, *, expert_parallel: bool) -> Placement:
        """A vLLM worker: attention divided, stacked experts; whole ones under expert parallelism, else a slice of each."""
        shapes = _shapes(self)
        shelf = Shelf(holder, "bfloat16", location)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            _vocabulary(shelf, name, (self.vocab, self.hidden), tp_rank, tp_size)
        _whole(shelf, shapes, "model.norm.weight")
        held = self.num_experts // tp_size if expert_parallel else self.num_experts
        experts = range(tp_rank * held, (tp_rank + 1) * held) if expert_parallel else range(held)
        at = (0, 1) if expert_parallel else (tp_rank, tp_size)
        for i in range(self.num_layers):
            layer = f"model.layers.{i}"
            for name in ("input_layernorm", "post_attention_layernorm", "mlp.gate"):
                _whole(shelf, shapes, f"{layer}.{name}.weight")
            _attention(shelf, shapes, layer, self.num_groups, tp_rank, tp_size)
            both = [[f"{layer}.mlp.experts.{e}.{x}_proj.weight" for x in ("gate", "up")] for e in experts]
            shelf.stack(f"{layer}.mlp.experts.w13_weight", [[(n, chunk(shapes[n], 0, *at)) for n in pair] for pair in both])
            downs = [f"{layer}.mlp.experts.{e}.down_proj.weight" for e in experts]
            shelf.stack(f"{layer}.mlp.experts.w2_weight", [[(n, chunk(shapes[n], 1, *at))] for n in downs])
        return shelf.placement()

    def case(
        self, *, world_size: int, ep_size: int, pp_size: int, num_engines: int, engine_tp: int, expert_parallel: bool, first_gpu: int = 0
    ) -> Case:
        # Replicas and the same worker of each engine are laid out once.
        per_stage = world_size // pp_size
        held: dict[tuple[int, int], Placement] = {}
        actors = []
        for rank in range(world_size):
            key = rank // per_stage, rank % per_stage % ep_size
            if key not in held:
                held[key] = self.actor(rank, ep_size, pp_size, world_size)
            actors.append(replace(held[key], holder=f"actor {rank}", location=place(rank)))
        shapes = [self.worker(r, engine_tp, "", place(0), expert_parallel=expert_parallel) for r in range(engine_tp)]
        workers = [
            replace(shapes[r], holder=f"engine {e} worker {r}", location=place(first_gpu + e * engine_tp + r))
            for e in range(num_engines)
            for r in range(engine_tp)
        ]
        return Case(tuple(self.tensors()), tuple(actors), tuple(workers))


@lru_cache(maxsize=4)
def _shapes(experts: Experts) -> Mapping[str, tuple[int, ...]]:
    return {t.name: t.shape for t in experts.tensors()}


_HEAD = ["model.norm.weight", "lm_head.weight"]
_SMALL = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate",
)  # fmt: skip

_EXPERTS = SHAPES["qwen3-30b-a3b"]
QWEN3_30B_A3B = Experts(
    num_layers=_EXPERTS["num_hidden_layers"],
    num_experts=_EXPERTS["num_experts"],
    hidden=_EXPERTS["hidden_size"],
    moe_ffn=_EXPERTS["moe_intermediate_size"],
    num_heads=_EXPERTS["num_attention_heads"],
    num_groups=_EXPERTS["num_key_value_heads"],
    head_dim=_EXPERTS["head_dim"],
    vocab=_EXPERTS["vocab_size"],
)
# As many bytes, experts and ranks as DeepSeek-V3 (706e9 parameters, 46,563 tensors), with plain attention and experts in every layer.
DEEPSEEK_V3_SIZE = Experts(
    num_layers=60, num_experts=256, hidden=7168, moe_ffn=2048, num_heads=128, num_groups=128, head_dim=128, vocab=129280
)
LLAMA31_405B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
    "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "dtype": "bfloat16", "tie_word_embeddings": False,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
