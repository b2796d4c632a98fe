// CUDA C++ as host C++, for tests: every thread of a block is a fibre, blocks run one after another.
//
// Barriers and warp primitives are meeting points: a fibre waits there until all that must come have come, at the same
// operation; anything else (lanes that have left, masks that are not full, two operations at once) is an error, as it
// would be undefined on the device. The order of blocks, and of lanes between two meeting points, can be forwards,
// backwards or random; in random order a fibre may also lose its turn at every atomic operation.
// This finds errors of logic; it cannot find a race between threads that really run at once.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

enum Wait { RUNNABLE, DONE, BARRIER, BALLOT, SHUFFLE, SHUFFLE_UP, MATCH };

struct Fibre {
    ucontext_t start;
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    bool started = false;
    Wait wait = DONE;
    unsigned long long value = 0, result = 0;
    int lane = 0;  // the lane a shuffle asks for
};

constexpr std::size_t STACK = 64 * 1024;
static ucontext_t scheduler;
static jmp_buf scheduler_place;
static std::vector<std::unique_ptr<Fibre>> fibres;
static std::vector<unsigned> order;
static unsigned current;
static std::function<void()> body;
static const char *problem;
static int mode;  // 0 forwards, 1 backwards, 2 random
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

inline void to_scheduler() {
    if (_setjmp(fibres[current]->place) == 0) _longjmp(scheduler_place, 1);
}

inline void enter() {
    body();
    fibres[current]->wait = DONE;
    _longjmp(scheduler_place, 1);
}

inline unsigned long long meet(Wait wait, unsigned long long value, int lane = 0) {
    Fibre &fibre = *fibres[current];
    fibre.wait = wait;
    fibre.value = value;
    fibre.lane = lane;
    to_scheduler();
    return fibres[current]->result;
}

inline void pause() {
    if (mode == 2 && random() % 4 == 0) to_scheduler();
}

inline void run_fibre(unsigned index) {
    Fibre &fibre = *fibres[index];
    current = index;
    threadIdx.x = index;
    if (_setjmp(scheduler_place) != 0) return;
    if (fibre.started) _longjmp(fibre.place, 1);
    fibre.started = true;
    // Only the first entry pays for swapcontext, which asks the kernel for the signal mask.
    swapcontext(&scheduler, &fibre.start);
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

inline void shuffle_order(std::vector<unsigned> &items) {
    for (unsigned i = 0; i < items.size(); ++i) items[i] = mode == 1 ? unsigned(items.size()) - 1 - i : i;
    if (mode == 2)
        for (unsigned i = unsigned(items.size()); i > 1; --i) std::swap(items[i - 1], items[random() % i]);
}

inline void run_block(unsigned threads) {
    while (fibres.size() < threads) {
        fibres.emplace_back(new Fibre);
        fibres.back()->stack.reset(new char[STACK]);
    }
    for (unsigned i = 0; i < threads; ++i) {
        Fibre &fibre = *fibres[i];
        getcontext(&fibre.start);
        fibre.start.uc_stack.ss_sp = fibre.stack.get();
        fibre.start.uc_stack.ss_size = STACK;
        fibre.start.uc_link = nullptr;
        makecontext(&fibre.start, enter, 0);
        fibre.started = false;
        fibre.wait = RUNNABLE;
    }
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
            unsigned long long any = 0;
            for (unsigned i = 0; i < threads; ++i) any |= fibres[i]->value;
            for (unsigned i = 0; i < threads; ++i) {
                fibres[i]->result = any;
                fibres[i]->wait = RUNNABLE;
            }
            progress = true;
        }
        if (!progress) return fail("threads wait for each other at different operations, or for some that have left");
    }
}

template <class... Parameters, std::size_t... I>
void set_body(void (*kernel)(Parameters...), void **arguments, std::index_sequence<I...>) {
    body = [=] { kernel(*static_cast<std::decay_t<Parameters> *>(arguments[I])...); };
}

// Run a kernel; `sizes` are the bytes of each argument. Returns what went wrong, or null.
template <class... Parameters>
const char *launch(
    void (*kernel)(Parameters...), unsigned grid, unsigned block, void **arguments, const int *sizes, int count,
    int how, unsigned long long random_seed
) {
    const int expected[] = {int(sizeof(Parameters))...};
    if (count != int(sizeof...(Parameters))) return "wrong number of arguments";
    for (int i = 0; i < count; ++i)
        if (sizes[i] != expected[i]) return "an argument of the wrong size";
    if (block % 32 != 0 || block > 1024) return "a block that is not made of whole warps";
    problem = nullptr;
    mode = how;
    random_state = random_seed | 1;
    gridDim.x = grid;
    blockDim.x = block;
    set_body(kernel, arguments, std::index_sequence_for<Parameters...>());
    std::vector<unsigned> blocks(grid);
    shuffle_order(blocks);
    for (unsigned b : blocks) {
        blockIdx.x = b;
        run_block(block);
        if (problem) break;
    }
    return problem;
}

template <class T> unsigned long long bits(T value) {
    unsigned long long word = 0;
    std::memcpy(&word, &value, sizeof(T));
    return word;
}

template <class T> T from_bits(unsigned long long word) {
    T value;
    std::memcpy(&value, &word, sizeof(T));
    return value;
}

inline void need_full(unsigned mask) {
    if (mask != 0xFFFFFFFFu) fail("a warp primitive with a mask that is not full");
}

}  // namespace host

inline void __syncthreads() { host::meet(host::BARRIER, 0); }
inline int __syncthreads_or(int flag) { return host::meet(host::BARRIER, flag != 0) != 0; }
inline unsigned __ballot_sync(unsigned mask, int flag) {
    host::need_full(mask);
    return unsigned(host::meet(host::BALLOT, flag != 0));
}
template <class T> unsigned __match_any_sync(unsigned mask, T value) {
    host::need_full(mask);
    return unsigned(host::meet(host::MATCH, host::bits(value)));
}
template <class T> T __shfl_sync(unsigned mask, T value, int lane) {
    host::need_full(mask);
    return host::from_bits<T>(host::meet(host::SHUFFLE, host::bits(value), lane & 31));
}
template <class T> T __shfl_up_sync(unsigned mask, T value, int delta) {
    host::need_full(mask);
    return host::from_bits<T>(host::meet(host::SHUFFLE_UP, host::bits(value), delta));
}
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __ffs(int word) { return __builtin_ffs(word); }

template <class T> struct same {
    typedef T type;
};
template <class T> T atomicMin(T *cell, typename same<T>::type value) {
    host::pause();
    const T old = *cell;
    if (value < old) *cell = value;
    return old;
}
template <class T> T atomicAdd(T *cell, typename same<T>::type value) {
    host::pause();
    const T old = *cell;
    *cell = old + value;
    return old;
}
template <class T> T atomicCAS(T *cell, typename same<T>::type compare, typename same<T>::type value) {
    host::pause();
    const T old = *cell;
    if (old == compare) *cell = value;
    return old;
}
