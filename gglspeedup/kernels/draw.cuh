// The drawing kernels: which edges a hop takes. Needs philox.cuh, pieces.cuh and batch.cuh before it.
//
// Floyd's selection in parallel. Let t_j = d - K + j and p_j the draw of j in [0, t_j]. One after the other, pick j is
// p_j, or t_j if p_j was picked before. After step i the value p_i is in the set, whatever was picked; t_i is in the
// set only if p_i was in it already (or is t_i itself). Hence j is replaced iff p_i = p_j for some i < j, or
// p_j = t_i for some i < j and i is replaced: a chain of falling indices, resolved by pointer jumping.
// A chain's cell is the next index, or one of the two ends:
#define REPLACED 0xFFFFu
#define KEPT 0xFFFEu
#define IS_END(chain) ((chain) >= KEPT)

struct Output {
    Index *neighbour;  // of this hop
    i64 *position;     // in indices; these of the whole batch
    int *target;
    u32 *first;
};

__device__ __forceinline__ void write_edge(
    const Output &out, const Table &table, VECTOR(Index) indices, u32 hop_edges, u32 seeds, u32 edge, i64 place,
    u32 target
) {
    const Index neighbour = indices[place];
    const u32 e = hop_edges + edge;
    out.neighbour[edge] = neighbour;
    out.position[e] = place;
    out.target[e] = (int)target;
    const u32 cell = put(table, neighbour, seeds + e);
#ifdef HASH_TABLE
    out.first[seeds + e] = cell;
#else
    (void)cell;
#endif
}

#define DRAW_PARAMETERS                                                                                              \
    const i64 *state, int hop, int frontier, int fanout, int replace, VECTOR(Index) indices,                         \
        const i64 *nodes, const i64 *row_start, const u32 *row_degree, const u32 *row_first, const i64 *sums,        \
        Index *neighbour, i64 *position, int *target, u32 *first, Entry *keys, u32 *values, i64 mask
#define DRAW_ARGUMENTS                                                                                               \
    state, hop, frontier, fanout, replace, indices, nodes, row_start, row_degree, row_first, sums, neighbour,        \
        position, target, first, keys, values, mask

// WIDTH lanes a row, one lane a pick: fanout <= WIDTH <= 32. All 32 lanes stay together.
template <int WIDTH> __device__ __forceinline__ void draw_narrow(DRAW_PARAMETERS) {
    OWN(state, nodes, row_start, row_degree, row_first, sums, neighbour, position, target, first);
    const Rows rows = rows_of(state, hop, frontier);
    const Table table = table_of(state, keys, values, mask);
    const Output out = {neighbour, position, target, first};
    const u32 hop_edges = (u32)edges_before(state, hop), seeds = (u32)state[SEEDS];
    const u64 seed = (u64)state[SEED], batch = (u64)state[BATCH];
    const int lane = threadIdx.x & 31, j = lane & (WIDTH - 1), group = lane / WIDTH;
    const u32 step = gridDim.x * (blockDim.x / WIDTH);
    const u32 warp = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    for (u32 low = warp * (32 / WIDTH); low < rows.count; low += step) {
        const u32 r = low + group;
        const bool live = r < rows.count;
        i64 start = 0, node = 0;
        u32 degree = 0, edge = 0, count = 0, pick = (u32)j;
        bool draws = false;
        if (live) {
            start = row_start[r];
            node = nodes[rows.low + r];  // beside the others, though few rows may need it: it is not waited for on its own
            degree = row_degree[r];
            edge = (u32)sums[r / TILE_ROWS] + row_first[r];
            count = (u32)edges_of(degree, fanout, replace);
            draws = (u32)j < count && (replace || degree > (u32)fanout);
        }
        if (draws) {
            const Stream stream = stream_of(seed, batch, hop, node);
            pick = bounded(stream, (u32)j, replace ? degree : degree - (u32)fanout + (u32)j + 1u);
        }
        if (!replace && __ballot_sync(FULL, draws) != 0) {
            const u32 base = degree - (u32)fanout;
            const u64 key = draws ? ((u64)group << 32) | pick : (1ULL << 40) | (u64)lane;
            const bool seen = (__match_any_sync(FULL, key) & ((1u << lane) - 1u)) != 0;
            u32 chain = seen ? REPLACED : KEPT;
            if (draws && !seen && pick >= base && pick - base < (u32)j) chain = (u32)(lane - j) + pick - base;
            while (__ballot_sync(FULL, !IS_END(chain)) != 0) {
                const u32 next = __shfl_sync(FULL, chain, (int)(chain & 31u));
                if (!IS_END(chain)) chain = next;
            }
            if (draws && chain == REPLACED) pick = base + (u32)j;
        }
        if ((u32)j < count)
            write_edge(out, table, indices, hop_edges, seeds, edge + j, start + pick, rows.low + r);
    }
}

extern "C" __global__ void draw_8(DRAW_PARAMETERS) { draw_narrow<8>(DRAW_ARGUMENTS); }
extern "C" __global__ void draw_16(DRAW_PARAMETERS) { draw_narrow<16>(DRAW_ARGUMENTS); }
extern "C" __global__ void draw_32(DRAW_PARAMETERS) { draw_narrow<32>(DRAW_ARGUMENTS); }

// A block a row, fanout <= LARGEST. The first of equal draws comes out of a hash of value -> smallest index.
template <int LARGEST> __device__ __forceinline__ void draw_wide(DRAW_PARAMETERS) {
    __shared__ u32 cell_value[2 * LARGEST], cell_index[2 * LARGEST];
    __shared__ unsigned short cell_of[LARGEST], chains[2][LARGEST];
    OWN(state, nodes, row_start, row_degree, row_first, sums, neighbour, position, target, first);
    const Rows rows = rows_of(state, hop, frontier);
    const Table table = table_of(state, keys, values, mask);
    const Output out = {neighbour, position, target, first};
    const u32 hop_edges = (u32)edges_before(state, hop), seeds = (u32)state[SEEDS];
    const int thread = threadIdx.x, threads = blockDim.x;
    u32 cells = 64;
    while (cells < 2u * (u32)fanout) cells *= 2;
    for (u32 r = blockIdx.x; r < rows.count; r += gridDim.x) {
        const i64 start = row_start[r];
        const i64 node = nodes[rows.low + r];
        const u32 degree = row_degree[r];
        const u32 edge = (u32)sums[r / TILE_ROWS] + row_first[r];
        const int count = (int)edges_of(degree, fanout, replace);
        const bool draws = count > 0 && (replace || degree > (u32)fanout);
        const Stream stream = stream_of((u64)state[SEED], (u64)state[BATCH], hop, node);
        if (!draws || replace) {
            for (int j = thread; j < count; j += threads) {
                const u32 pick = draws ? bounded(stream, (u32)j, degree) : (u32)j;
                write_edge(out, table, indices, hop_edges, seeds, edge + j, start + pick, rows.low + r);
            }
            continue;
        }
        const u32 base = degree - (u32)fanout;
        for (int c = thread; c < (int)cells; c += threads) {
            cell_value[c] = FULL;
            cell_index[c] = FULL;
        }
        __syncthreads();
        for (int j = thread; j < count; j += threads) {
            const u32 pick = bounded(stream, (u32)j, base + (u32)j + 1u);
            u32 cell = (pick * 0x9E3779B1u >> 16) & (cells - 1);
            for (;;) {
                const u32 found = atomicCAS(&cell_value[cell], FULL, pick);
                if (found == FULL || found == pick) break;
                cell = (cell + 1) & (cells - 1);
            }
            atomicMin(&cell_index[cell], (u32)j);
            cell_of[j] = (unsigned short)cell;
        }
        __syncthreads();
        bool more = false;
        for (int j = thread; j < count; j += threads) {
            const bool seen = cell_index[cell_of[j]] < (u32)j;
            const u32 pick = cell_value[cell_of[j]];
            u32 chain = seen ? REPLACED : KEPT;
            if (!seen && pick >= base && pick - base < (u32)j) {
                chain = pick - base;
                more = true;
            }
            chains[0][j] = (unsigned short)chain;
        }
        int side = 0;
        while (__syncthreads_or(more)) {
            more = false;
            for (int j = thread; j < count; j += threads) {
                u32 chain = chains[side][j];
                if (!IS_END(chain)) chain = chains[side][chain];
                more = more || !IS_END(chain);
                chains[1 - side][j] = (unsigned short)chain;
            }
            side = 1 - side;
        }
        for (int j = thread; j < count; j += threads) {
            const u32 pick = chains[side][j] == REPLACED ? base + (u32)j : cell_value[cell_of[j]];
            write_edge(out, table, indices, hop_edges, seeds, edge + j, start + pick, rows.low + r);
        }
        __syncthreads();  // the next row clears the cells
    }
}

// Two, as a block of the larger one takes eight times the shared memory, and so the place of other blocks.
extern "C" __global__ void draw_128(DRAW_PARAMETERS) { draw_wide<128>(DRAW_ARGUMENTS); }
extern "C" __global__ void draw_1024(DRAW_PARAMETERS) { draw_wide<MAX_FANOUT>(DRAW_ARGUMENTS); }

// The last row of [low, high] whose first edge is not after `edge`; it is not empty, for the next one begins later.
__device__ __forceinline__ u32 row_of(u32 edge, u32 low, u32 high, const u32 *row_first, const i64 *sums) {
    while (low < high) {
        const u32 middle = low + (high - low + 1) / 2;
        if ((u32)sums[middle / TILE_ROWS] + row_first[middle] <= edge) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// Every neighbour of every row: threads are dealt out by edges, so that a hub's row is shared by many blocks.
extern "C" __global__ void draw_all(DRAW_PARAMETERS) {
    __shared__ u32 ends[2];
    OWN(state, nodes, row_start, row_degree, row_first, sums, neighbour, position, target, first);
    const Rows rows = rows_of(state, hop, frontier);
    const Table table = table_of(state, keys, values, mask);
    const Output out = {neighbour, position, target, first};
    const u32 hop_edges = (u32)edges_before(state, hop), seeds = (u32)state[SEEDS];
    const u32 count = (u32)edges_before(state, hop + 1) - hop_edges;
    (void)nodes;
    (void)row_degree;
    (void)fanout;
    (void)replace;
    for (u32 low = blockIdx.x * TILE_EDGES; low < count; low += gridDim.x * TILE_EDGES) {
        const u32 high = low + TILE_EDGES < count ? low + TILE_EDGES : count;
        __syncthreads();
        if (threadIdx.x < 2) ends[threadIdx.x] = row_of(threadIdx.x ? high - 1 : low, 0, rows.count - 1, row_first, sums);
        __syncthreads();
        for (u32 e = low + threadIdx.x; e < high; e += blockDim.x) {
            const u32 r = row_of(e, ends[0], ends[1], row_first, sums);
            const i64 place = row_start[r] + (e - ((u32)sums[r / TILE_ROWS] + row_first[r]));
            write_edge(out, table, indices, hop_edges, seeds, e, place, rows.low + r);
        }
    }
}
