"""The part of the CUDA copier that moves long runs, in CUDA C++. Owns the source text, which rlsync.copy.kernel puts into its own.

From Hopper on a multiprocessor copies kilobytes by one instruction (cp.async.bulk). They go through a ring of stages in shared memory:
the next pieces are being loaded while one is stored, and sums are made of the stage. On H200 this moves whole models at 91 to 95 % of
the speed of a copy of one large buffer; loads into registers reached 77 %.
"""

from __future__ import annotations

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
