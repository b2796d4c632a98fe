// What the kernels of a batch share: types, the counts in `state`, the rows of a hop, and the table of nodes.
// Needs philox.cuh before it.
//
// Macros: INDEX64 (indices are 64-bit), HASH_TABLE (open addressing; else one entry a node), MANY_BATCHES (several in a
// launch; needs HASH_TABLE).

#ifdef INDEX64
typedef i64 Index;
typedef u64 Key;
#else
typedef int Index;
typedef u32 Key;
#endif

#define FULL 0xFFFFFFFFu
#define TILE_ROWS 256    // rows of one block sum; the block of count_rows
#define TILE_EDGES 1024  // edges of one block sum: 8 warps, 4 rounds of 32
#define EDGE_THREADS 256
#define MAX_FANOUT 1024
#define MOST_HOPS 16  // of several batches in a launch

// Cells of `state`; sample_gpu.py has the same.
enum {
    SEEDS = 0, SEED = 1, BATCH = 2, STAMP = 3, STRIDE = 4, FIRST_SEED = 5, OUTPUT = 6, BAD_RANGE = 7, BAD_DUPLICATE = 8,
    NODES = 9, EDGES = 10, STATE_SIZE = NODES + 2 * (MOST_HOPS + 1)
};
#define NONE 0x7FFFFFFFFFFFFFFFLL

// Of several batches in a launch, blockIdx.y is the number of the block's. Each has a state of its own, a part of every
// array, which begins a stride after that of the batch before, and a table. OWN makes pointers those of the block's batch.
#ifdef MANY_BATCHES
template <class State, class... Arrays> __device__ __forceinline__ void own(State &state, Arrays &...arrays) {
    state += blockIdx.y * (unsigned)STATE_SIZE;
    const i64 begin = blockIdx.y * state[STRIDE];
    (void)begin;
    ((arrays += begin), ...);
}
#define OWN(...) own(__VA_ARGS__)
#define OWN_SEEDS(state, seeds) seeds += state[FIRST_SEED]
#else
#define OWN(...)
#define OWN_SEEDS(state, seeds)
#endif

__device__ __forceinline__ i64 nodes_before(const i64 *state, int hop) { return state[NODES + 2 * hop]; }
__device__ __forceinline__ i64 edges_before(const i64 *state, int hop) { return state[EDGES + 2 * hop]; }

// Positions, and so rows and edges of a batch, are below 2^31 (workspace_gpu.py): 32 bits of them save registers.
struct Rows {
    u32 low, count;
};

// The rows a hop draws: all nodes so far, or those the last hop brought; none once a seed is known to be bad.
__device__ __forceinline__ Rows rows_of(const i64 *state, int hop, int frontier) {
    Rows rows;
    rows.low = (frontier && hop > 0) ? (u32)nodes_before(state, hop - 1) : 0;
    rows.count = (u32)nodes_before(state, hop) - rows.low;
    if (state[BAD_RANGE] != NONE || state[BAD_DUPLICATE] != NONE) rows.count = 0;
    return rows;
}

__device__ __forceinline__ i64 edges_of(i64 degree, int fanout, int replace) {
    return (fanout > 0 && degree > 0 && (replace || degree > fanout)) ? fanout : degree;
}

// --- the table: node -> smallest position ---------------------------------------------------------------------------

#ifdef HASH_TABLE

typedef Key Entry;
#define EMPTY ((Key)~(Key)0)

struct Table {
    Entry *keys;
    u32 *values;
    u64 mask;
    u64 stamp;
};

// Return the cell of a node. Which cell that is depends on who came first and is never seen outside; the value, a
// minimum, does not.
__device__ __forceinline__ u32 put(const Table &table, i64 node, u32 position) {
    const Key key = (Key)node;
    u64 mixed = (u64)node * 0x9E3779B97F4A7C15ULL;
    mixed ^= mixed >> 32;
    u64 cell = mixed & table.mask;
    for (;;) {
        Key found = table.keys[cell];
        if (found == EMPTY) {
            found = atomicCAS(&table.keys[cell], EMPTY, key);
            if (found == EMPTY) found = key;
        }
        if (found == key) break;
        cell = (cell + 1) & table.mask;
    }
    atomicMin(&table.values[cell], position);
    return (u32)cell;
}

// `cell` is what put returned.
__device__ __forceinline__ u32 smallest(const Table &table, i64, u32 cell) { return table.values[cell]; }

#else

typedef u64 Entry;

struct Table {
    Entry *keys;
    u32 *values;
    u64 mask;
    u64 stamp;
};

// The stamp in the upper half falls from batch to batch, so any entry of this batch is below all that older ones left:
// one minimum both clears the entry and finds the first occurrence.
__device__ __forceinline__ u32 put(const Table &table, i64 node, u32 position) {
    atomicMin(&table.keys[node], (table.stamp << 32) | position);
    return 0;
}

__device__ __forceinline__ u32 smallest(const Table &table, i64 node, u32) { return (u32)table.keys[node]; }

#endif

__device__ __forceinline__ Table table_of(const i64 *state, Entry *keys, u32 *values, i64 mask) {
#ifdef MANY_BATCHES
    keys += blockIdx.y * (mask + 1);
    values += blockIdx.y * (mask + 1);
#endif
    const Table table = {keys, values, (u64)mask, (u64)state[STAMP]};
    return table;
}
