// CUDA C++ as host C++, for tests: every thread is a fibre (fibres_on_host.hpp), which may be watched (watch_on_host.hpp).
#pragma once
#include <cstdio>
#include <cstring>
#include <tuple>

#include "fibres_on_host.hpp"
#include "watch_on_host.hpp"

#define __global__
#define __device__
#define __forceinline__ inline

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace host {

template <class... Parameters, std::size_t... I>
void set_body(void (*kernel)(Parameters...), void **arguments, std::index_sequence<I...>) {
    body = [=] { kernel(*static_cast<std::decay_t<Parameters> *>(arguments[I])...); };
}

// Run a kernel; `sizes` are the bytes of each argument. Returns what went wrong, or null.
template <class... Parameters>
const char *launch(
    void (*kernel)(Parameters...), unsigned grid, unsigned layers, unsigned block, void **arguments, const int *sizes,
    int count, int how, unsigned long long random_seed, int broken = 0
) {
    const int expected[] = {int(sizeof(Parameters))...};
    if (count != int(sizeof...(Parameters))) return "wrong number of arguments";
    for (int i = 0; i < count; ++i)
        if (sizes[i] != expected[i]) return "an argument of the wrong size";
    if (block % 32 != 0 || block > 1024) return "a block that is not made of whole warps";
    problem = nullptr;
    mode = how;
    broken_line = broken;
    random_state = random_seed | 1;
    gridDim.x = grid;
    gridDim.y = layers;
    blockDim.x = threads = block;
    forget_races();
    set_body(kernel, arguments, std::index_sequence_for<Parameters...>());
    run_grid(grid * layers);
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

inline void barrier(int line) {
    if (line != broken_line) meet(BARRIER, 0);
}

template <class T> struct same {
    typedef T type;
};

// One operation, or (on the broken line) a load, and a store where the value is another one.
template <class T, class Change> T atomic(int line, T *cell, Change change) {
    watching = false;
    const bool whole = line != broken_line;
    if (whole) pause();
    touch(cell, sizeof(T), whole ? ATOMIC : READ);
    const T old = *cell, value = change(old);
    if (!whole && value != old) touch(cell, sizeof(T), WRITE);
    if (value != old) *cell = value;
    watching = true;
    return old;
}
template <class T> T atomic_min(int line, T *cell, typename same<T>::type value) {
    return atomic(line, cell, [=](T old) { return value < old ? value : old; });
}
template <class T> T atomic_add(int line, T *cell, typename same<T>::type value) {
    return atomic(line, cell, [=](T old) { return T(old + value); });
}
template <class T>
T atomic_cas(int line, T *cell, typename same<T>::type compare, typename same<T>::type value) {
    return atomic(line, cell, [=](T old) { return old == compare ? value : old; });
}

}  // namespace host

#define __syncthreads() host::barrier(__LINE__)
#define atomicMin(cell, value) host::atomic_min(__LINE__, cell, value)
#define atomicAdd(cell, value) host::atomic_add(__LINE__, cell, value)
#define atomicCAS(cell, compare, value) host::atomic_cas(__LINE__, cell, compare, value)

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
