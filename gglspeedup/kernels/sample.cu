// Neighbour sampling of whole batches: the hops' kernels, the launches of which never depend on the data.
//
// The number of rows and edges of a hop is known on the device only: every kernel is launched for a bound, reads the
// true counts in `state`, and walks its tiles with the stride of the grid. So the launches of a batch are the same
// each time, may be recorded in a graph, and need the host once, at the end.
//
//   insert_seeds, check_seeds                 the seeds are positions 0, 1, ... of the batch
//   then a hop:
//   count_rows, scan_sums                     degrees -> edges of every row, and where they begin
//   draw_8 | draw_16 | draw_32 | draw_128 | draw_1024 | draw_all
//   count_first, scan_sums, assign            an edge at position p is its node's first occurrence iff the table says p
//   and after the one read:
//   emit_edges (a hop), copy_ids
//
// Several batches in a launch (macro MANY_BATCHES) have the same kernels, with blocks of their own each, and then
//   place_outputs, the one read, and emit_batches
//
// The table gives for each node the smallest position it occurs at, by atomic minimum: no result depends on which
// thread came first. Positions count through the batch: the seeds, the edges of hop 0, of hop 1, ...

#include "philox.cuh"
#include "registers.cuh"
#include "pieces.cuh"
#include "batch.cuh"
#include "draw.cuh"

// --- the table and the seeds -----------------------------------------------------------------------------------------

extern "C" __global__ void fill_ones(u64 *words, i64 count) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        words[i] = ~0ULL;
}

// Put the batch's nodes, up to hop `hop`, into a table that has replaced a smaller one.
extern "C" __global__ void refill_table(
    const i64 *state, int hop, const i64 *nodes, const int *local_id, const u32 *first, Entry *keys, u32 *values,
    i64 mask
) {
    OWN(state, nodes, local_id, first);
    const Table table = table_of(state, keys, values, mask);
    const i64 end = state[SEEDS] + edges_before(state, hop);
    for (i64 p = (i64)blockIdx.x * blockDim.x + threadIdx.x; p < end; p += (i64)gridDim.x * blockDim.x)
        if (first[p] == (u32)p) put(table, nodes[local_id[p]], (u32)p);
}

extern "C" __global__ void insert_seeds(
    i64 *state, const i64 *seeds, i64 num_nodes, i64 *nodes, int *local_id, u32 *first, Entry *keys, u32 *values,
    i64 mask
) {
    OWN(state, nodes, local_id, first);
    OWN_SEEDS(state, seeds);
    const Table table = table_of(state, keys, values, mask);
    const i64 count = state[SEEDS];
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const i64 v = seeds[i];
        if (v < 0 || v >= num_nodes) {
            atomicMin(&state[BAD_RANGE], i);
            continue;
        }
        first[i] = put(table, v, (u32)i);
        nodes[i] = v;
        local_id[i] = (int)i;
    }
}

extern "C" __global__ void check_seeds(
    i64 *state, const i64 *seeds, i64 num_nodes, u32 *first, Entry *keys, u32 *values, i64 mask
) {
    OWN(state, first);
    OWN_SEEDS(state, seeds);
    const Table table = table_of(state, keys, values, mask);
    const i64 count = state[SEEDS];
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const i64 v = seeds[i];
        if (v < 0 || v >= num_nodes) continue;
        const u32 position = smallest(table, v, first[i]);
        first[i] = position;
        if (position != (u32)i) atomicMin(&state[BAD_DUPLICATE], i);
    }
}

// --- sums of tiles --------------------------------------------------------------------------------------------------

// Exclusive scan over a block of at most 32 warps; `total` is set in every thread. Every thread must come.
__device__ __forceinline__ i64 block_scan(i64 value, i64 &total) {
    __shared__ i64 warp_sums[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    i64 running = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const i64 other = __shfl_up_sync(FULL, running, step);
        if (lane >= step) running += other;
    }
    __syncthreads();  // the sums of the call before have been read
    if (lane == 31) warp_sums[warp] = running;
    __syncthreads();
    i64 before = 0;
    total = 0;
    for (int w = 0; w < warps; ++w) {
        const i64 sum = warp_sums[w];
        if (w < warp) before += sum;
        total += sum;
    }
    return before + running - value;
}

// Find start, degree and first edge (within the tile) of the rows, and the edges of each tile.
extern "C" REGISTERS(32) __global__ void count_rows(
    const i64 *state, int hop, int frontier, int fanout, int replace, VECTOR(i64) indptr, const i64 *nodes,
    i64 *row_start, u32 *row_degree, u32 *row_first, i64 *sums
) {
    OWN(state, nodes, row_start, row_degree, row_first, sums);
    const Rows rows = rows_of(state, hop, frontier);
    const i64 tiles = (rows.count + TILE_ROWS - 1) / TILE_ROWS;
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const i64 r = tile * TILE_ROWS + threadIdx.x;
        i64 edges = 0;
        if (r < rows.count) {
            const i64 v = nodes[rows.low + r];
            const i64 start = indptr[v];
            const i64 degree = indptr[v + 1] - start;
            edges = edges_of(degree, fanout, replace);
            row_start[r] = start;
            row_degree[r] = (u32)degree;
        }
        i64 total;
        const i64 before = block_scan(edges, total);
        if (r < rows.count) row_first[r] = (u32)before;
        if (threadIdx.x == 0) sums[tile] = total;
    }
}

// One block a batch: replace the sums of tiles by those before them, and add up the hop's edges (of_rows) or new nodes.
extern "C" __global__ void scan_sums(i64 *state, int hop, int frontier, int of_rows, i64 *sums) {
    OWN(state, sums);
    i64 tiles;
    if (of_rows) {
        tiles = (rows_of(state, hop, frontier).count + TILE_ROWS - 1) / TILE_ROWS;
    } else {
        tiles = (edges_before(state, hop + 1) - edges_before(state, hop) + TILE_EDGES - 1) / TILE_EDGES;
    }
    i64 carry = 0;
    for (i64 low = 0; low < tiles; low += blockDim.x) {
        const i64 tile = low + threadIdx.x;
        i64 total;
        const i64 before = block_scan(tile < tiles ? sums[tile] : 0, total);
        if (tile < tiles) sums[tile] = carry + before;
        carry += total;
    }
    if (threadIdx.x == 0) {
        if (of_rows) {
            state[EDGES + 2 * (hop + 1)] = edges_before(state, hop) + carry;
        } else {
            state[NODES + 2 * (hop + 1)] = nodes_before(state, hop) + carry;
        }
    }
}

// --- local ids ------------------------------------------------------------------------------------------------------

// Look the edges' first occurrences up, and count those that are one, tile by tile.
extern "C" REGISTERS(32) __global__ void count_first(
    const i64 *state, int hop, const Index *neighbour, u32 *first, i64 *sums, Entry *keys, u32 *values, i64 mask
) {
    OWN(state, neighbour, first, sums);
    __shared__ int warp_counts[EDGE_THREADS / 32];
    const Table table = table_of(state, keys, values, mask);
    const i64 low = edges_before(state, hop), count = edges_before(state, hop + 1) - low, base = state[SEEDS] + low;
    const i64 tiles = (count + TILE_EDGES - 1) / TILE_EDGES;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const i64 begin = tile * TILE_EDGES + warp * (TILE_EDGES / (EDGE_THREADS / 32)) + lane;
        int found = 0;
        u32 position[TILE_EDGES / EDGE_THREADS];
        // All reads before the first write, which the compiler would not let a later read overtake.
#pragma unroll
        for (int round = 0; round < TILE_EDGES / EDGE_THREADS; ++round) {
            const i64 e = begin + round * 32;
            if (e < count) position[round] = smallest(table, neighbour[e], first[base + e]);
        }
#pragma unroll
        for (int round = 0; round < TILE_EDGES / EDGE_THREADS; ++round) {
            const i64 e = begin + round * 32;
            if (e < count) first[base + e] = position[round];
            found += __popc(__ballot_sync(FULL, e < count && position[round] == (u32)(base + e)));
        }
        if (lane == 0) warp_counts[warp] = found;
        __syncthreads();
        if (threadIdx.x == 0) {
            i64 sum = 0;
            for (int w = 0; w < EDGE_THREADS / 32; ++w) sum += warp_counts[w];
            sums[tile] = sum;
        }
        __syncthreads();
    }
}

// Give the first occurrences their local ids, in the order of the edges, and list the new nodes.
extern "C" REGISTERS(32) __global__ void assign(
    const i64 *state, int hop, const Index *__restrict__ neighbour, const u32 *first, const i64 *sums, i64 *nodes,
    int *local_id
) {
    OWN(state, neighbour, first, sums, nodes, local_id);
    __shared__ int warp_counts[EDGE_THREADS / 32];
    const i64 low = edges_before(state, hop), count = edges_before(state, hop + 1) - low, base = state[SEEDS] + low;
    const i64 known = nodes_before(state, hop);
    const i64 tiles = (count + TILE_EDGES - 1) / TILE_EDGES;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const i64 begin = tile * TILE_EDGES + warp * (TILE_EDGES / (EDGE_THREADS / 32)) + lane;
        u32 masks[TILE_EDGES / EDGE_THREADS];
        int found = 0;
        i64 id = known + sums[tile];
#pragma unroll
        for (int round = 0; round < TILE_EDGES / EDGE_THREADS; ++round) {
            const i64 e = begin + round * 32;
            masks[round] = __ballot_sync(FULL, e < count && first[base + e] == (u32)(base + e));
            found += __popc(masks[round]);
        }
        if (lane == 0) warp_counts[warp] = found;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < EDGE_THREADS / 32; ++w) id += w < warp ? warp_counts[w] : 0;
#pragma unroll
        for (int round = 0; round < TILE_EDGES / EDGE_THREADS; ++round) {
            const i64 e = begin + round * 32;
            if (masks[round] >> lane & 1u) {
                const i64 mine = id + __popc(masks[round] & ((1u << lane) - 1u));
                nodes[mine] = neighbour[e];
                local_id[base + e] = (int)mine;
            }
            id += __popc(masks[round]);
        }
        __syncthreads();
    }
}

// --- what the caller gets -------------------------------------------------------------------------------------------

// The edges [low, low + count) of the batch; `seeds` is the number of seeds.
__device__ __forceinline__ void emit(
    i64 seeds, i64 low, i64 count, const u32 *__restrict__ first, const int *__restrict__ local_id,
    const i64 *__restrict__ position, const int *__restrict__ target, int has_edge_ids, VECTOR(i64) edge_ids,
    i64 *edge_index, i64 *e_id
) {
#pragma unroll 1
    for (i64 e = (i64)blockIdx.x * blockDim.x + threadIdx.x; e < count; e += (i64)gridDim.x * blockDim.x) {
        const u32 occurrence = first[seeds + low + e];
        const i64 place = position[low + e];
        const int row = target[low + e];
        const int id = local_id[occurrence];
        const i64 edge_id = has_edge_ids ? edge_ids[place] : place;
        edge_index[e] = id;
        edge_index[count + e] = row;
        e_id[e] = edge_id;
    }
}

extern "C" __global__ void emit_edges(
    i64 seeds, i64 low, i64 count, const u32 *__restrict__ first, const int *__restrict__ local_id,
    const i64 *__restrict__ position, const int *__restrict__ target, int has_edge_ids, VECTOR(i64) edge_ids,
    i64 *edge_index, i64 *e_id
) {
    emit(seeds, low, count, first, local_id, position, target, has_edge_ids, edge_ids, edge_index, e_id);
}

extern "C" __global__ void copy_ids(i64 count, const i64 *__restrict__ from, i64 *to) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        to[i] = from[i];
}

// --- what the caller of several batches gets, in one buffer -------------------------------------------------------------------

// Arrays of the output begin on 64 bytes.
__device__ __forceinline__ i64 room_of(i64 cells) { return (cells + 7) / 8 * 8; }

// Find where each batch's output begins: its nodes, then edge_index and e_id of every hop.
extern "C" __global__ void place_outputs(i64 *state, int hops, int batches) {
    i64 carry = 0;
    for (int low = 0; low < batches; low += blockDim.x) {
        const int batch = low + threadIdx.x;
        i64 *own_state = state + (i64)batch * STATE_SIZE;
        i64 cells = 0;
        if (batch < batches) {
            cells = room_of(nodes_before(own_state, hops));
            for (int hop = 0; hop < hops; ++hop) {
                const i64 edges = edges_before(own_state, hop + 1) - edges_before(own_state, hop);
                cells += room_of(2 * edges) + room_of(edges);
            }
        }
        i64 total;
        const i64 before = block_scan(cells, total);
        if (batch < batches) own_state[OUTPUT] = carry + before;
        carry += total;
    }
}

extern "C" __global__ void emit_batches(
    const i64 *state, int hops, const i64 *__restrict__ nodes, const u32 *__restrict__ first,
    const int *__restrict__ local_id, const i64 *__restrict__ position, const int *__restrict__ target,
    int has_edge_ids, VECTOR(i64) edge_ids, i64 *output
) {
    OWN(state, nodes, first, local_id, position, target);
    const i64 count = nodes_before(state, hops);
    i64 *to = output + state[OUTPUT];
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        to[i] = nodes[i];
    to += room_of(count);
#pragma unroll 1
    for (int hop = 0; hop < hops; ++hop) {
        const i64 low = edges_before(state, hop), edges = edges_before(state, hop + 1) - low;
        i64 *e_id = to + room_of(2 * edges);
        emit(state[SEEDS], low, edges, first, local_id, position, target, has_edge_ids, edge_ids, to, e_id);
        to = e_id + room_of(edges);
    }
}
