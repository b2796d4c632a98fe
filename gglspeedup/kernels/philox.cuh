// Counter-based randomness: Philox4x32-10 and unbiased bounded integers, as in random.py, which holds the layout of
// the counter and the papers. Nothing of the host's headers is used: NVRTC has none.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct Words {
    u32 w0, w1, w2, w3;
};

// What is the same for every draw of one node in one hop.
struct Stream {
    u32 c1, c2, c3, k0, k1;
};

__device__ __forceinline__ Words philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 p0 = (u64)0xD2511F53u * c0;
        const u64 p1 = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(p1 >> 32) ^ c1 ^ k0;
        c1 = (u32)p1;
        c2 = (u32)(p0 >> 32) ^ c3 ^ k1;
        c3 = (u32)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const Words words = {c0, c1, c2, c3};
    return words;
}

__device__ __forceinline__ Stream stream_of(u64 seed, u64 batch, int hop, i64 node) {
    Stream s;
    s.c1 = (u32)node;
    s.c2 = (u32)batch;
    s.c3 = ((u32)((u64)node >> 32) & 0xFFu) | ((u32)hop << 8) | ((u32)(batch >> 32) << 16);
    s.k0 = (u32)seed;
    s.k1 = (u32)(seed >> 32);
    return s;
}

// The word of one draw. Selects, not an indexed array: an array would live in local memory.
__device__ __forceinline__ u32 word_of(const Stream &s, u32 draw, u32 attempt) {
    const Words w = philox((attempt << 16) | (draw >> 2), s.c1, s.c2, s.c3, s.k0, s.k1);
    const u32 low = (draw & 1u) ? w.w1 : w.w0;
    const u32 high = (draw & 1u) ? w.w3 : w.w2;
    return (draw & 2u) ? high : low;
}

// Draw number `draw` of a stream, uniform in [0, bound), 0 < bound < 2^32. The division is only paid by the rare word
// whose low half is below the bound (Lemire, section 4).
__device__ __forceinline__ u32 bounded(const Stream &s, u32 draw, u32 bound) {
    u64 product = (u64)word_of(s, draw, 0) * bound;
    if ((u32)product < bound) {
        const u32 shortfall = (0u - bound) % bound;
        for (u32 attempt = 1; (u32)product < shortfall; ++attempt) product = (u64)word_of(s, draw, attempt) * bound;
    }
    return (u32)(product >> 32);
}
