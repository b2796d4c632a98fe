// Rows of a feature matrix: gathered from two tiers, scattered, and their ids checked.
//
// Rows are bytes, moved in the widest words that row width and base addresses allow; the name of a kernel ends with
// that width. A row is moved by a group of `lanes` lanes (a power of two, at most a warp), and a group has ROWS rows
// in flight at once: the ids, then the slots, then the words of all of them are asked for before the first is needed.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#include "pieces.cuh"
#include "registers.cuh"

#define FULL 0xFFFFFFFFu
#define ROWS 4

// Where rows come from; gather_gpu.py has the same.
enum { ONLY_COLD = 0, ONLY_HOT = 1, BY_SLOT = 2, BY_SLOT_BOTH = 3 };

// `counters` are the rows served by the hot and by the cold tier; `bad` is the first place in ids whose id is not in
// [0, num_rows): such a row is left as it is, so no memory outside is touched before the host has seen it.
template <class Word> __device__ __forceinline__ void gather_words(
    VECTOR(Word) hot, const int *__restrict__ slot, const Word *__restrict__ cold, int mode, i64 num_rows,
    const i64 *__restrict__ ids, i64 count, i64 row_words, int lanes, Word *__restrict__ out, u64 *counters, u64 *bad
) {
    __shared__ u32 served[2];
    if (threadIdx.x < 2) served[threadIdx.x] = 0;
    __syncthreads();
    const int lane = threadIdx.x & (lanes - 1);
    const int shift = __ffs(lanes) - 1;  // a division by a power of two that the compiler does not know
    const i64 groups = (i64)gridDim.x * (blockDim.x >> shift);
    const i64 group = (i64)blockIdx.x * (blockDim.x >> shift) + (threadIdx.x >> shift);
    for (i64 low = group * ROWS; low < count; low += groups * ROWS) {
        i64 id[ROWS];
        // All ids before the first check: what a check may write, the compiler lets no later read overtake.
#pragma unroll
        for (int k = 0; k < ROWS; ++k) id[k] = low + k < count ? ids[low + k] : -1;
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            if (low + k < count && (id[k] < 0 || id[k] >= num_rows)) {
                if (lane == 0) atomicMin(bad, (u64)(low + k));
                id[k] = -1;
            }
        }
        int place[ROWS];
#pragma unroll
        for (int k = 0; k < ROWS; ++k) place[k] = mode >= BY_SLOT && id[k] >= 0 ? slot[id[k]] : mode - ONLY_HOT;
        u32 hot_rows = 0, cold_rows = 0;
        const Word *from[ROWS];  // none where there is no row
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            const bool is_hot = place[k] >= 0;
            i64 row = id[k];
            if (mode == BY_SLOT_BOTH || (mode == BY_SLOT && is_hot)) row = is_hot ? place[k] : -1 - (i64)place[k];
            from[k] = is_hot ? ROW(hot, row, row_words) : cold + row * row_words;
            if (id[k] < 0) from[k] = nullptr;
            hot_rows += id[k] >= 0 && is_hot;
            cold_rows += id[k] >= 0 && !is_hot;
        }
        // At once: registers kept for it until the end would cost warps.
        if (lane == 0 && hot_rows) atomicAdd(&served[0], hot_rows);
        if (lane == 0 && cold_rows) atomicAdd(&served[1], cold_rows);
#pragma unroll 1
        for (i64 w = lane; w < row_words; w += lanes) {
            Word word[ROWS];
#pragma unroll
            for (int k = 0; k < ROWS; ++k)
                if (from[k]) word[k] = from[k][w];
#pragma unroll
            for (int k = 0; k < ROWS; ++k)
                if (from[k]) out[(low + k) * row_words + w] = word[k];
        }
    }
    __syncthreads();
    if (threadIdx.x < 2 && served[threadIdx.x]) atomicAdd(&counters[threadIdx.x], (u64)served[threadIdx.x]);
}

// out[positions[i]] = staged[i]
template <class Word> __device__ __forceinline__ void scatter_words(
    const Word *__restrict__ staged, const i64 *__restrict__ positions, i64 count, i64 row_words, int lanes,
    Word *__restrict__ out
) {
    const int lane = threadIdx.x & (lanes - 1);
    const int shift = __ffs(lanes) - 1;  // a division by a power of two that the compiler does not know
    const i64 groups = (i64)gridDim.x * (blockDim.x >> shift);
    const i64 group = (i64)blockIdx.x * (blockDim.x >> shift) + (threadIdx.x >> shift);
    for (i64 low = group * ROWS; low < count; low += groups * ROWS) {
        i64 row[ROWS];
#pragma unroll
        for (int k = 0; k < ROWS; ++k) row[k] = low + k < count ? positions[low + k] : -1;
#pragma unroll 1
        for (i64 w = lane; w < row_words; w += lanes) {
            Word word[ROWS];
#pragma unroll
            for (int k = 0; k < ROWS; ++k)
                if (row[k] >= 0) word[k] = staged[(low + k) * row_words + w];
#pragma unroll
            for (int k = 0; k < ROWS; ++k)
                if (row[k] >= 0) out[row[k] * row_words + w] = word[k];
        }
    }
}

// To find the piece that a row is in takes registers.
#ifdef IN_PIECES
#define GATHER_REGISTERS 48
#define GATHER_REGISTERS_16 64
#else
#define GATHER_REGISTERS 40
#define GATHER_REGISTERS_16 48
#endif

#define ROW_KERNELS(bytes, Word, of_gather, of_scatter)                                                              \
    extern "C" REGISTERS(of_gather) __global__ void gather_rows_##bytes(                                             \
        VECTOR(Word) hot, const int *slot, const Word *cold, int mode, i64 num_rows, const i64 *ids, i64 count,      \
        i64 row_words, int lanes, Word *out, u64 *counters, u64 *bad                                                 \
    ) {                                                                                                              \
        gather_words<Word>(hot, slot, cold, mode, num_rows, ids, count, row_words, lanes, out, counters, bad);       \
    }                                                                                                                \
    extern "C" REGISTERS(of_scatter) __global__ void scatter_rows_##bytes(                                           \
        const Word *staged, const i64 *positions, i64 count, i64 row_words, int lanes, Word *out                     \
    ) {                                                                                                              \
        scatter_words<Word>(staged, positions, count, row_words, lanes, out);                                        \
    }

ROW_KERNELS(16, uint4, GATHER_REGISTERS_16, 48)
ROW_KERNELS(8, uint2, GATHER_REGISTERS, 40)
ROW_KERNELS(4, u32, GATHER_REGISTERS, 40)
ROW_KERNELS(2, unsigned short, GATHER_REGISTERS, 40)
ROW_KERNELS(1, unsigned char, GATHER_REGISTERS, 48)

// bad = min(bad, first place in ids whose id is not in [0, num_rows)); one atomic a warp that has one.
extern "C" __global__ void check_ids(const i64 *__restrict__ ids, i64 count, i64 num_rows, u64 *bad) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 low = (i64)blockIdx.x * blockDim.x + (threadIdx.x & ~31u); low < count; low += step) {
        const i64 i = low + (threadIdx.x & 31u);
        const u32 mask = __ballot_sync(FULL, i < count && (ids[i] < 0 || ids[i] >= num_rows));
        if (mask != 0 && (threadIdx.x & 31u) == 0) atomicMin(bad, (u64)(low + __ffs((int)mask) - 1));
    }
}
