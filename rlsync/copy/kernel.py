"""The program of the CUDA copier, in CUDA C++. Owns the source text; what tables mean is in rlsync.copy.tables.

Blocks are single warps that stay, and take every so many-th task. Tasks of long runs are moved in bulk; all others, and all on GPUs before
Hopper, go through registers, several units a lane, which is right for everything and slower.

From Hopper on a multiprocessor copies kilobytes by one instruction (cp.async.bulk). They go through a ring of stages in shared memory:
the next pieces are being loaded while one is stored, and sums are made of the stage. On H200 this moves whole models at 91 to 95 % of
the speed of a copy of one large buffer; loads into registers reached 77 %.

Sums follow the formula of rlsync.copy.checksum: a unit is weighed by its place in the task, the lanes are added up, and one adds the
sum, times the power at which the task begins, to the pair's. Written for the runtime compiler: no headers.
"""

from __future__ import annotations

from rlsync.copy.checksum import BASE
from rlsync.copy.tables import FORMS, Form

NAME = "copy_tasks"
THREADS_PER_BLOCK = 32
BLOCKS_PER_MULTIPROCESSOR = 12
# Loads that a lane has in flight where registers are the way.
UNITS_IN_FLIGHT = 8

_ELEMENTS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

_SOURCE = r"""
typedef unsigned long long u64;
typedef long long i64;

struct Pair { u64 source, destination; i64 units_per_run; int first_dim; short num_dims, form; };
struct Dim { i64 size, source_step, destination_step; };
struct Task { i64 first_unit; int pair; unsigned units; };

template <int BYTES> struct Unit;
template <> struct Unit<1> { typedef unsigned char type; };
template <> struct Unit<2> { typedef unsigned short type; };
template <> struct Unit<4> { typedef unsigned int type; };
template <> struct Unit<8> { typedef uint2 type; };
template <> struct Unit<16> { typedef uint4 type; };

// Elements of casts; casts go through float, and round to the nearest, ties to even.
struct F32 {
  typedef float raw;
  static __device__ float decode(raw x) { return x; }
  static __device__ raw encode(float x) { return x; }
};
struct BF16 {
  typedef unsigned short raw;
  static __device__ float decode(raw x) { return __uint_as_float((unsigned)x << 16); }
  static __device__ raw encode(float x) { raw y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
};
struct F16 {
  typedef unsigned short raw;
  static __device__ float decode(raw x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
  static __device__ raw encode(float x) { raw y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
};

template <int BYTES> struct Same {
  typedef typename Unit<BYTES>::type Load;
  typedef Load Store;
  static __device__ Store of(Load x) { return x; }
};
template <class From, class To, int ELEMENTS> struct Cast {
  typedef typename Unit<ELEMENTS * sizeof(typename From::raw)>::type Load;
  typedef typename Unit<ELEMENTS * sizeof(typename To::raw)>::type Store;
  static __device__ Store of(Load x) {
    union { Load unit; typename From::raw elements[ELEMENTS]; } in;
    union { Store unit; typename To::raw elements[ELEMENTS]; } out;
    in.unit = x;
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) out.elements[i] = To::encode(From::decode(in.elements[i]));
    return out.unit;
  }
};

// BASE**exponent modulo 2**64.
__host__ __device__ constexpr u64 power(u64 exponent) {
  u64 result = 1, factor = BASE;
  for (; exponent; exponent >>= 1) {
    if (exponent & 1) result *= factor;
    factor *= factor;
  }
  return result;
}
__device__ u64 word(unsigned x) { return (u64)(i64)(int)x; }
// The words of a unit, weighed from its own beginning; of units below a word, its share in one. Tasks begin with whole words.
__device__ u64 weighed(uint4 x, unsigned) {
  constexpr u64 second = power(1), third = power(2), fourth = power(3);
  return word(x.x) + word(x.y) * second + word(x.z) * third + word(x.w) * fourth;
}
__device__ u64 weighed(uint2 x, unsigned) {
  constexpr u64 second = power(1);
  return word(x.x) + word(x.y) * second;
}
__device__ u64 weighed(unsigned x, unsigned) { return word(x); }
__device__ u64 weighed(unsigned short x, unsigned unit) { return unit & 1 ? word((unsigned)x << 16) : (u64)x; }
__device__ u64 weighed(unsigned char x, unsigned unit) { return (unit & 3) == 3 ? word((unsigned)x << 24) : (u64)x << 8 * (unit & 3); }

// Not inlined, because it is rare, and long to compile in every form.
__device__ __noinline__ void step_along(const Dim* dims, unsigned num_dims, u64 run, u64& from, u64& to) {
  for (unsigned d = 0; d < num_dims; ++d) {
    const u64 size = dims[d].size;
    // Divisions of 64 bits take several times as long.
    const u64 rest = (run | size) >> 32 ? run / size : (unsigned)run / (unsigned)size;
    const u64 index = run - rest * size;
    from += index * dims[d].source_step;
    to += index * dims[d].destination_step;
    run = rest;
  }
}

// Where the units of a task lie.
struct Places {
  u64 source, destination, first_run;
  unsigned first_in_run, units_per_run, num_dims;
  const Dim* dims;

  __device__ Places() {}
  __device__ Places(const Pair& pair, const Dim* all_dims, u64 first_unit)
      : source(pair.source), destination(pair.destination), first_run(first_unit), first_in_run(0),
        units_per_run((unsigned)pair.units_per_run), num_dims(pair.num_dims), dims(all_dims + pair.first_dim) {
    if (num_dims == 0) return;
    first_run = first_unit / pair.units_per_run;
    first_in_run = (unsigned)(first_unit - first_run * pair.units_per_run);
  }
  // Without dims all is one run, and first_run the first unit.
  template <int LOAD_BYTES, int STORE_BYTES> __device__ void find(unsigned unit, u64& from, u64& to) const {
    if (num_dims == 0) {
      from = source + (first_run + unit) * LOAD_BYTES;
      to = destination + (first_run + unit) * STORE_BYTES;
      return;
    }
    const unsigned at = first_in_run + unit, run_in_task = at / units_per_run, in_run = at - run_in_task * units_per_run;
    from = source + (u64)in_run * LOAD_BYTES;
    to = destination + (u64)in_run * STORE_BYTES;
    const u64 run = first_run + run_in_task;
    if (num_dims == 1) {
      from += run * dims->source_step;
      to += run * dims->destination_step;
    } else {
      step_along(dims, num_dims, run, from, to);
    }
  }
};

// Add what the lanes made of a task to its pair's sum.
__device__ void add_up(u64 sum, u64 first_word, u64* pair_sum) {
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_down_sync(~0u, sum, lanes);
  if (threadIdx.x == 0) atomicAdd(pair_sum, sum * power(first_word));
}

// Move the units of a task through registers, and sum them up.
template <class Form> __device__ void move(const Task& task, const Pair& pair, const Dim* dims, u64* sums) {
  typedef typename Form::Load Load;
  typedef typename Form::Store Store;
  constexpr u64 round = power(LANES * sizeof(Store) / 4);
  const Places places(pair, dims, task.first_unit);
  u64 sum = 0, weight = SUMMED ? power(threadIdx.x * sizeof(Store) / 4) : 0;
  for (unsigned first = threadIdx.x; first < task.units; first += LANES * UNITS) {
    Load loaded[UNITS];
    u64 to[UNITS];
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      if (first + i * LANES >= task.units) continue;
      u64 from;
      places.template find<sizeof(Load), sizeof(Store)>(first + i * LANES, from, to[i]);
      loaded[i] = *(const Load*)from;
    }
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      if (first + i * LANES >= task.units) continue;
      const Store stored = Form::of(loaded[i]);
      if (pair.destination) *(Store*)to[i] = stored;
      if (SUMMED) {
        sum += weight * weighed(stored, threadIdx.x);
        weight *= round;
      }
    }
  }
  if (SUMMED) add_up(sum, task.first_unit * sizeof(Store) / 4, sums + task.pair);
}

@BULK@
// The first num_bulk tasks can be moved in bulk.
extern "C" __global__ void __launch_bounds__(LANES)
copy_tasks(const Task* tasks, const Pair* pairs, const Dim* dims, u64* sums, int num_bulk, int num_tasks) {
  for (int index = move_in_bulk(tasks, num_bulk, pairs, dims, sums); index < num_tasks; index += gridDim.x) {
    const Task task = tasks[index];
    const Pair pair = pairs[task.pair];
    switch (pair.form) {
@CASES@
    }
  }
}
"""

# Compute capability that has bulk copies.
BULK_CAPABILITY = (9, 0)
# Of a block, in shared memory; a stage is a multiple of a warp's 32 units of 16 bytes. Smaller stages cost a tenth of the speed.
STAGES, STAGE_UNITS = 3, 256

BULK_SOURCE = r"""
#if __CUDA_ARCH__ >= 900
// The pieces of this block's tasks, one after the other: what fits into a stage.
struct Cursor {
  const Task* tasks;
  const Pair* pairs;
  const Dim* dims;
  int index, end;
  unsigned at;
  Task task;
  Places places;

  __device__ Cursor(const Task* all_tasks, int num_tasks, const Pair* all_pairs, const Dim* all_dims)
      : tasks(all_tasks), pairs(all_pairs), dims(all_dims), index(blockIdx.x), end(num_tasks), at(0) { open(); }
  __device__ bool is_open() const { return index < end; }
  __device__ bool is_last() const { return at + STAGE_UNITS >= task.units; }
  __device__ unsigned units() const { return min(task.units - at, STAGE_UNITS); }
  __device__ void open() {
    if (!is_open()) return;
    task = tasks[index];
    places = Places(pairs[task.pair], dims, task.first_unit);
  }
  __device__ void advance() {
    at += STAGE_UNITS;
    if (at < task.units) return;
    at = 0;
    index += gridDim.x;
    open();
  }
  // The stretches of the piece that are dense on both sides, divided among the lanes: (first unit of the stage, bytes, from, to).
  template <class Act> __device__ void each_stretch(Act act) const {
    const unsigned end_unit = at + units();
    u64 from, to;
    if (places.num_dims == 0) {
      places.find<16, 16>(at, from, to);
      if (threadIdx.x == 0) act(0u, units() * 16, from, to);
      return;
    }
    for (u64 run = (places.first_in_run + at) / places.units_per_run + threadIdx.x;; run += LANES) {
      const i64 run_begin = (i64)(run * places.units_per_run) - places.first_in_run, run_end = run_begin + places.units_per_run;
      if (run_begin >= end_unit) return;
      const unsigned begin = max(run_begin, (i64)at), stop = min(run_end, (i64)end_unit);
      places.find<16, 16>(begin, from, to);
      act(begin - at, (stop - begin) * 16, from, to);
    }
  }
};

__device__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Move tasks of 16-byte units and long runs; returns the first task of this block that is not among them.
__device__ int move_in_bulk(const Task* tasks, int num_bulk, const Pair* pairs, const Dim* dims, u64* sums) {
  __shared__ __align__(128) uint4 stages[STAGES][STAGE_UNITS];
  __shared__ u64 full[STAGES];
  Cursor loading(tasks, num_bulk, pairs, dims), storing = loading;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + s)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  unsigned num_loading = 0, num_stored = 0;
  const auto load = [&] {
    if (!loading.is_open()) return;
    const unsigned barrier = shared_address(full + num_loading % STAGES);
    const uint4* stage = stages[num_loading % STAGES];
    if (threadIdx.x == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(loading.units() * 16) : "memory");
    __syncwarp();
    loading.each_stretch([&](unsigned unit, unsigned bytes, u64 from, u64) {
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                   "r"(shared_address(stage + unit)), "l"(from), "r"(bytes), "r"(barrier) : "memory");
    });
    loading.advance();
    ++num_loading;
  };
  constexpr u64 round = power(LANES * 4);
  u64 sum = 0, weight = power(threadIdx.x * 4);
  for (int i = 0; i < STAGES - 1; ++i) load();
  for (; storing.is_open(); storing.advance(), ++num_stored) {
    const uint4* stage = stages[num_stored % STAGES];
    unsigned is_full = 0;
    while (!is_full)
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(is_full) : "r"(shared_address(full + num_stored % STAGES)), "r"(num_stored / STAGES & 1) : "memory");
    if (storing.places.destination)
      storing.each_stretch([&](unsigned unit, unsigned bytes, u64, u64 to) {
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::
                     "l"(to), "r"(shared_address(stage + unit)), "r"(bytes) : "memory");
      });
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    if (SUMMED) {
#pragma unroll 4
      for (unsigned unit = threadIdx.x; unit < storing.units(); unit += LANES, weight *= round) sum += weight * weighed(stage[unit], 0);
      if (storing.is_last()) {
        add_up(sum, storing.task.first_unit * 4, sums + storing.task.pair);
        sum = 0;
        weight = power(threadIdx.x * 4);
      }
    }
    // The stage before this one is free when its stores have read it, and no lane sums it up any more.
    asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    __syncwarp();
    load();
  }
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  return storing.index;
}
#else
__device__ int move_in_bulk(const Task*, int, const Pair*, const Dim*, u64*) { return blockIdx.x; }
#endif
"""


def _step(form: Form) -> str:
    """The C++ type that moves units of a form."""
    if form.dtypes is None:
        return f"Same<{form.load_bytes}>"
    given, taken = (_ELEMENTS[d] for d in form.dtypes)
    return f"Cast<{given}, {taken}, {form.load_bytes} / sizeof({given}::raw)>"


def source() -> str:
    """CUDA C++ of the kernel NAME: (tasks, pairs, dims, sums: addresses of device memory; num_bulk, num_tasks: int32)."""
    cases = (f"      case {number}: move<{_step(form)}>(task, pair, dims, sums); break;" for number, form in enumerate(FORMS))
    return _SOURCE.replace("@CASES@", "\n".join(cases)).replace("@BULK@", BULK_SOURCE)


def options(*, summed: bool) -> tuple[str, ...]:
    """Arguments for the compiler; ``summed`` kernels add to ``sums`` (uint64, by pair), others do not touch it."""
    sizes = {"LANES": THREADS_PER_BLOCK, "STAGES": STAGES, "STAGE_UNITS": f"{STAGE_UNITS}u", "UNITS": UNITS_IN_FLIGHT}
    values = {"BASE": f"{BASE:#x}ull", "SUMMED": int(summed), **sizes}
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in values.items()))
