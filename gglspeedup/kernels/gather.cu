// Rows of a feature matrix: gathered from two tiers, scattered, and their ids checked.
//
// Rows are bytes, moved in the widest words that row width and base addresses allow; the name of a kernel ends with
// that width. A row is moved by a group of `lanes` lanes (a power of two, at most a warp), and a group has ROWS rows
// in flight at once: the ids, then the slots, then the words of all of them are asked for before the first is needed.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#include "pieces.cuh"

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
    const i64 groups = (i64)gridDim.x * (blockDim.x / lanes);
    const i64 group = (i64)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    u32 hot_rows = 0, cold_rows = 0;
    for (i64 low = group * ROWS; low < count; low += groups * ROWS) {
        i64 id[ROWS];
        const Word *from[ROWS];
        bool is_hot[ROWS];
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            id[k] = low + k < count ? ids[low + k] : -1;
            if (low + k < count && (id[k] < 0 || id[k] >= num_rows)) {
                if (lane == 0) atomicMin(bad, (u64)(low + k));
                id[k] = -1;
            }
        }
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            i64 row = id[k];
            is_hot[k] = mode == ONLY_HOT;
            if (mode >= BY_SLOT && row >= 0) {
                const int s = slot[row];
                is_hot[k] = s >= 0;
                if (s >= 0) {
                    row = s;
                } else if (mode == BY_SLOT_BOTH) {
                    row = -1 - (i64)s;
                }
            }
            from[k] = is_hot[k] ? ROW(hot, row, row_words) : cold + row * row_words;
        }
        Word *to = out + low * row_words;
        for (i64 w = lane; w < row_words; w += lanes) {
            Word word[ROWS];
#pragma unroll
            for (int k = 0; k < ROWS; ++k)
                if (id[k] >= 0) word[k] = from[k][w];
#pragma unroll
            for (int k = 0; k < ROWS; ++k)
                if (id[k] >= 0) to[k * row_words + w] = word[k];
        }
        if (lane == 0) {
#pragma unroll
            for (int k = 0; k < ROWS; ++k) {
                hot_rows += id[k] >= 0 && is_hot[k];
                cold_rows += id[k] >= 0 && !is_hot[k];
            }
        }
    }
    if (hot_rows) atomicAdd(&served[0], hot_rows);
    if (cold_rows) atomicAdd(&served[1], cold_rows);
    __syncthreads();
    if (threadIdx.x < 2 && served[threadIdx.x]) atomicAdd(&counters[threadIdx.x], (u64)served[threadIdx.x]);
}

// out[positions[i]] = staged[i]
template <class Word> __device__ __forceinline__ void scatter_words(
    const Word *__restrict__ staged, const i64 *__restrict__ positions, i64 count, i64 row_words, int lanes,
    Word *__restrict__ out
) {
    const int lane = threadIdx.x & (lanes - 1);
    const i64 groups = (i64)gridDim.x * (blockDim.x / lanes);
    const i64 group = (i64)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    for (i64 low = group * ROWS; low < count; low += groups * ROWS) {
        i64 row[ROWS];
#pragma unroll
        for (int k = 0; k < ROWS; ++k) row[k] = low + k < count ? positions[low + k] : -1;
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

#define ROW_KERNELS(bytes, Word)                                                                                     \
    extern "C" __global__ void gather_rows_##bytes(                                                                  \
        VECTOR(Word) hot, const int *slot, const Word *cold, int mode, i64 num_rows, const i64 *ids, i64 count,      \
        i64 row_words, int lanes, Word *out, u64 *counters, u64 *bad                                                 \
    ) {                                                                                                              \
        gather_words<Word>(hot, slot, cold, mode, num_rows, ids, count, row_words, lanes, out, counters, bad);       \
    }                                                                                                                \
    extern "C" __global__ void scatter_rows_##bytes(                                                                 \
        const Word *staged, const i64 *positions, i64 count, i64 row_words, int lanes, Word *out                     \
    ) {                                                                                                              \
        scatter_words<Word>(staged, positions, count, row_words, lanes, out);                                        \
    }

ROW_KERNELS(16, uint4)
ROW_KERNELS(8, uint2)
ROW_KERNELS(4, u32)
ROW_KERNELS(2, unsigned short)
ROW_KERNELS(1, unsigned char)

// bad = min(bad, first place in ids whose id is not in [0, num_rows)); one atomic a warp that has one.
extern "C" __global__ void check_ids(const i64 *__restrict__ ids, i64 count, i64 num_rows, u64 *bad) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 low = (i64)blockIdx.x * blockDim.x + (threadIdx.x & ~31u); low < count; low += step) {
        const i64 i = low + (threadIdx.x & 31u);
        const u32 mask = __ballot_sync(FULL, i < count && (ids[i] < 0 || ids[i] >= num_rows));
        if (mask != 0 && (threadIdx.x & 31u) == 0) atomicMin(bad, (u64)(low + __ffs((int)mask) - 1));
    }
}
