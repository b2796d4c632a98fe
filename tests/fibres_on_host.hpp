// Threads of a grid as fibres, and the orders in which they run. Part of cuda_on_host.hpp.
//
// Barriers and warp primitives are meeting points: a fibre waits there until all that must come have come, at the same
// operation; anything else (lanes that have left, masks that are not full, two operations at once) is an error, as it
// would be undefined on the device.
//
// FORWARDS, BACKWARDS, RANDOM: blocks one after another, lanes in that order between two meeting points; in random
// order a fibre may also lose its turn at an atomic operation.
// SHUFFLED, RACES: several blocks at once; any fibre of them may be next. A fibre loses its turn at every atomic
// operation and, where the kernels are compiled to say what they touch (watch_on_host.hpp), before any access to memory:
// whether that is every one or every 32nd on average differs between launches, and in each launch one warp is slow.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

enum Wait { RUNNABLE, DONE, BARRIER, BALLOT, SHUFFLE, SHUFFLE_UP, MATCH };
enum Mode { FORWARDS, BACKWARDS, RANDOM, SHUFFLED, RACES };

struct Fibre {
    ucontext_t start;
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    bool started = false;
    Wait wait = DONE;
    unsigned long long value = 0, result = 0;
    int lane = 0;  // the lane a shuffle asks for
};

// A block that is at work, with memory of its own that its threads share.
struct Block {
    unsigned index = 0, running = 0, at_barrier = 0, epoch = 0;
    std::vector<unsigned> arrived;  // lanes of each warp at a meeting point of the warp
    std::vector<std::vector<char>> shared;
};

constexpr std::size_t STACK = 64 * 1024;
constexpr unsigned RESIDENT = 4;  // blocks at once, when shuffled
static ucontext_t scheduler;
static jmp_buf scheduler_place;
static std::vector<std::unique_ptr<Fibre>> fibres;
static Block resident[RESIDENT];
static std::vector<unsigned> order, ready;
static unsigned current, threads;
static std::function<void()> body;
static const char *problem;
static int mode;
// Whether a kernel's own code is running, not that of these headers. Volatile, as the compiler takes it that hooks of
// -fsanitize=thread see nothing of this file.
static volatile bool watching;
static unsigned slow_warp, left_warp, patience;
static unsigned long long random_state = 1;

inline unsigned long long random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

inline void fail(const char *text) {
    if (!problem) problem = text;
}

inline Block &block_of(unsigned fibre) { return resident[fibre / threads]; }

inline void to_scheduler() {
    if (_setjmp(fibres[current]->place) == 0) _longjmp(scheduler_place, 1);
}

inline void enter() {
    for (;;) {  // a fibre that has done its part is used again: to make one is dear
        watching = true;
        body();
        watching = false;
        fibres[current]->wait = DONE;
        to_scheduler();
    }
}

inline unsigned long long meet(Wait wait, unsigned long long value, int lane = 0) {
    watching = false;
    Fibre &fibre = *fibres[current];
    fibre.wait = wait;
    fibre.value = value;
    fibre.lane = lane;
    to_scheduler();
    const unsigned long long result = fibres[current]->result;
    watching = true;
    return result;
}

// Before an atomic operation.
inline void pause() {
    left_warp = current / 32;
    if (mode >= SHUFFLED || (mode == RANDOM && random() % 4 == 0)) to_scheduler();
}

inline void run_fibre(unsigned index) {
    Fibre &fibre = *fibres[index];
    current = index;
    threadIdx.x = index % threads;
    blockIdx.x = block_of(index).index % gridDim.x;
    blockIdx.y = block_of(index).index / gridDim.x;
    if (_setjmp(scheduler_place) != 0) return;
    if (fibre.started) _longjmp(fibre.place, 1);
    fibre.started = true;
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get();
    fibre.start.uc_stack.ss_size = STACK;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, enter, 0);
    // Only the first entry pays for swapcontext, which asks the kernel for the signal mask.
    swapcontext(&scheduler, &fibre.start);
}

// What a block of threads shares under one name; `site` is the name's.
inline void *shared(unsigned site, std::size_t bytes) {
    watching = false;
    std::vector<std::vector<char>> &all = block_of(current).shared;
    if (all.size() <= site) all.resize(site + 1);
    if (all[site].size() != bytes) all[site].assign(bytes, char(0xA5));
    void *memory = all[site].data();
    watching = true;
    return memory;
}

// Let a warp go on whose lanes all wait at the same operation. Returns whether it did.
inline bool release_warp(unsigned low, unsigned high) {
    const Wait wait = fibres[low]->wait;
    if (wait < BALLOT) return false;
    for (unsigned i = low; i < high; ++i)
        if (fibres[i]->wait != wait) return false;
    for (unsigned i = low; i < high; ++i) {
        unsigned long long result = 0;
        if (wait == SHUFFLE) {
            result = fibres[low + unsigned(fibres[i]->lane)]->value;
        } else if (wait == SHUFFLE_UP) {
            const int from = int(i - low) - fibres[i]->lane;
            result = fibres[from < 0 ? i : low + unsigned(from)]->value;
        } else {
            for (unsigned k = low; k < high; ++k) {
                const bool set = wait == BALLOT ? fibres[k]->value != 0 : fibres[k]->value == fibres[i]->value;
                if (set) result |= 1ULL << (k - low);
            }
        }
        fibres[i]->result = result;
    }
    for (unsigned i = low; i < high; ++i) fibres[i]->wait = RUNNABLE;
    return true;
}

// Let a block go on all of whose threads wait at a barrier.
inline void release_block(unsigned low) {
    unsigned long long any = 0;
    for (unsigned i = low; i < low + threads; ++i) any |= fibres[i]->value;
    for (unsigned i = low; i < low + threads; ++i) {
        fibres[i]->result = any;
        fibres[i]->wait = RUNNABLE;
    }
    ++block_of(low).epoch;
}

inline void shuffle_order(std::vector<unsigned> &items) {
    for (unsigned i = 0; i < items.size(); ++i) items[i] = mode == BACKWARDS ? unsigned(items.size()) - 1 - i : i;
    if (mode >= RANDOM)
        for (unsigned i = unsigned(items.size()); i > 1; --i) std::swap(items[i - 1], items[random() % i]);
}

constexpr const char *STUCK = "threads wait for each other at different operations, or for some that have left";

inline void start_block(unsigned place, unsigned index) {
    Block &block = resident[place];
    block.index = index;
    block.running = threads;
    block.at_barrier = 0;
    ++block.epoch;
    block.arrived.assign((threads + 31) / 32, 0);
    for (std::vector<char> &bytes : block.shared)
        if (!bytes.empty()) std::memset(bytes.data(), 0xA5, bytes.size());
    while (fibres.size() < (place + 1) * threads) {
        fibres.emplace_back(new Fibre);
        fibres.back()->stack.reset(new char[STACK]);
    }
    for (unsigned i = place * threads; i < (place + 1) * threads; ++i) fibres[i]->wait = RUNNABLE;
}

inline void run_block(unsigned index) {
    start_block(0, index);
    order.resize(threads);
    for (;;) {
        bool progress = false;
        unsigned done = 0, at_barrier = 0;
        shuffle_order(order);
        for (unsigned i : order)
            if (fibres[i]->wait == RUNNABLE) {
                run_fibre(i);
                progress = true;
            }
        for (unsigned low = 0; low < threads; low += 32)
            progress |= release_warp(low, low + 32 < threads ? low + 32 : threads);
        for (unsigned i = 0; i < threads; ++i) {
            done += fibres[i]->wait == DONE;
            at_barrier += fibres[i]->wait == BARRIER;
        }
        if (done == threads || problem) return;
        if (at_barrier == threads) {
            release_block(0);
            progress = true;
        }
        if (!progress) return fail(STUCK);
    }
}

// A place in `ready`: any, but seldom one of the slow warp, nor of the one that was just left.
inline unsigned choose() {
    for (unsigned attempt = 0;; ++attempt) {
        const unsigned pick = unsigned(random() % ready.size()), warp = ready[pick] / 32;
        if (attempt == 64 || (warp != slow_warp && warp != left_warp)) return pick;
    }
}

inline void wake(unsigned low, unsigned high) {
    for (unsigned i = low; i < high; ++i) ready.push_back(i);
}

// See to a fibre that has stopped: whether those that it meets may go on. Returns whether its block is done.
inline bool settle(unsigned index) {
    Block &block = block_of(index);
    const unsigned first = index / threads * threads, warp = (index - first) / 32, low = first + warp * 32;
    if (fibres[index]->wait == DONE) return --block.running == 0;
    if (fibres[index]->wait == BARRIER) {
        if (++block.at_barrier == threads) {
            block.at_barrier = 0;
            release_block(first);
            wake(first, first + threads);
        }
    } else if (++block.arrived[warp] == 32) {
        block.arrived[warp] = 0;
        if (!release_warp(low, low + 32)) fail(STUCK);
        wake(low, low + 32);
    }
    return false;
}

inline void run_shuffled(const std::vector<unsigned> &blocks) {
    const unsigned places = unsigned(blocks.size()) < RESIDENT ? unsigned(blocks.size()) : RESIDENT;
    unsigned next = 0, done = 0;
    ready.clear();
    for (; next < places; ++next) {
        start_block(next, blocks[next]);
        wake(next * threads, (next + 1) * threads);
    }
    slow_warp = unsigned(random() % (places * threads / 32));
    left_warp = ~0u;
    patience = unsigned(1u << random() % 6);
    while (!ready.empty() && !problem) {
        const unsigned pick = choose(), index = ready[pick];
        left_warp = ~0u;
        run_fibre(index);
        if (fibres[index]->wait == RUNNABLE) continue;
        ready[pick] = ready.back();
        ready.pop_back();
        if (!settle(index)) continue;
        ++done;
        if (next == blocks.size()) continue;
        const unsigned place = index / threads;
        start_block(place, blocks[next++]);
        wake(place * threads, (place + 1) * threads);
    }
    if (done != blocks.size()) fail(STUCK);
}

inline void run_grid(unsigned grid) {
    std::vector<unsigned> blocks(grid);
    shuffle_order(blocks);
    if (mode >= SHUFFLED) {
        run_shuffled(blocks);
    } else {
        for (unsigned b : blocks)
            if (!problem) run_block(b);
    }
    if (!problem) return;
    for (auto &fibre : fibres) fibre->started = false;  // they stopped in the middle
}

}  // namespace host
