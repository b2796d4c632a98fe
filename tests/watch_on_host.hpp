// What kernels touch, for cuda_on_host.hpp: compiled with -fsanitize=thread, the compiler calls a hook before every access
// to memory. The hooks are here, not in its library: a fibre may lose its turn there, and races are found.
//
// A race: two threads touch the same byte, one of them writes, and no barrier of their block lies between; threads of
// different blocks have none. Shared memory that its block has not written is not to be read, either. Atomic operations on the same byte are none; nor is a plain read beside atomic operations,
// as hardware reads an aligned word whole. (Warp primitives promise no order of memory, and are taken for none.) Such an
// order being fixed by barriers alone, one schedule finds every race among the accesses that it has made.
#pragma once
#include <cstdint>
#include <cstdio>
#include <unordered_map>
#include <vector>

#include "fibres_on_host.hpp"

namespace host {

static int broken_line;  // the line whose barrier is left out, or whose atomic operation is made of a load and a store

enum Access { READ, WRITE, ATOMIC };

// The last access of a block's threads; `thread` is SEVERAL after more than one of them since its last barrier.
struct Trace {
    unsigned block, epoch, thread;
};
constexpr unsigned SEVERAL = ~0u;
static std::unordered_map<std::uintptr_t, std::vector<Trace>> traces[3];
static char found[200];

// Whether another thread has been there with no barrier since. Shared memory of another block is other memory.
inline bool meets(const std::vector<Trace> &seen, const Trace &mine, bool is_shared) {
    for (const Trace &other : seen) {
        if (other.block != mine.block ? !is_shared : other.epoch == mine.epoch && other.thread != mine.thread)
            return true;
    }
    return false;
}

inline bool has(const std::vector<Trace> &seen, unsigned block) {
    for (const Trace &other : seen)
        if (other.block == block) return true;
    return false;
}

inline bool is_shared(std::uintptr_t address) {
    for (const std::vector<char> &bytes : block_of(current).shared)
        if (address - std::uintptr_t(bytes.data()) < bytes.size()) return true;
    return false;
}

inline void note(std::vector<Trace> &seen, const Trace &mine) {
    for (Trace &other : seen) {
        if (other.block != mine.block) continue;
        other.thread = other.epoch == mine.epoch && other.thread != mine.thread ? SEVERAL : mine.thread;
        other.epoch = mine.epoch;
        return;
    }
    seen.push_back(mine);
}

inline void check_race(std::uintptr_t address, std::size_t bytes, Access access) {
    static const char *const names[] = {"reads", "writes", "atomically changes"};
    const Block &block = block_of(current);
    const Trace mine = {block.index, block.epoch, current % threads};
    const bool within = is_shared(address);
    for (std::uintptr_t byte = address; byte < address + bytes; ++byte) {
        for (int other = READ; other <= ATOMIC; ++other) {
            const bool harmless = access == other ? access != WRITE : access != WRITE && other != WRITE;
            if (harmless || !meets(traces[other][byte], mine, within)) continue;
            std::snprintf(
                found, sizeof found, "a race: thread %u of block %u %s what another %s", mine.thread, mine.block,
                names[access], names[other]
            );
            fail(found);
        }
        if (within && access != WRITE && !has(traces[WRITE][byte], mine.block)) fail("shared memory read before written");
        note(traces[access][byte], mine);
    }
}

inline bool is_private(std::uintptr_t address) {
    const std::uintptr_t stack = std::uintptr_t(fibres[current]->stack.get());
    if (address == std::uintptr_t(&watching)) return true;
    for (const dim3 *index : {&threadIdx, &blockIdx, &blockDim, &gridDim})
        if (address - std::uintptr_t(index) < sizeof(dim3)) return true;
    return address - stack < STACK;
}

inline void touch(const void *cell, std::size_t bytes, Access access) {
    const std::uintptr_t address = std::uintptr_t(cell);
    if (is_private(address)) return;
    if (mode >= SHUFFLED && random() % patience == 0) to_scheduler();
    if (mode == RACES) check_race(address, bytes, access);
    if (problem) to_scheduler();  // which does not come back: what a race leaves may be no index
}

inline void forget_races() {
    for (auto &seen : traces) seen.clear();
}

}  // namespace host

#ifdef __SANITIZE_THREAD__
#define HOOK extern "C" __attribute__((no_sanitize("thread"), noinline)) void
#define ACCESS(name, bytes, access)                                                                                  \
    HOOK __tsan_##name(void *cell) {                                                                                 \
        if (!host::watching) return;                                                                                 \
        host::watching = false;                                                                                      \
        host::touch(cell, bytes, host::access);                                                                      \
        host::watching = true;                                                                                       \
    }
ACCESS(read1, 1, READ)
ACCESS(read2, 2, READ)
ACCESS(read4, 4, READ)
ACCESS(read8, 8, READ)
ACCESS(read16, 16, READ)
ACCESS(write1, 1, WRITE)
ACCESS(write2, 2, WRITE)
ACCESS(write4, 4, WRITE)
ACCESS(write8, 8, WRITE)
ACCESS(write16, 16, WRITE)
#define RANGE(name, access)                                                                                          \
    HOOK __tsan_##name(void *cell, unsigned long bytes) {                                                            \
        if (!host::watching) return;                                                                                 \
        host::watching = false;                                                                                      \
        host::touch(cell, bytes, host::access);                                                                      \
        host::watching = true;                                                                                       \
    }
RANGE(read_range, READ)
RANGE(write_range, WRITE)
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void *) {}
HOOK __tsan_func_exit(void *) {}
HOOK __tsan_vptr_update(void **, void *) {}
#endif
