// A vector that a kernel reads, whole or (macro IN_PIECES) in pieces that lie apart: in the memory of several devices, or
// pinned on the host. Its table: the number of pieces, where each begins, and where element 0 would lie if each reached
// back to it. Needs the types of its includer.

#ifdef IN_PIECES

// The table holds addresses of global memory. Told so, the compiler reads by instructions for that alone, rather than
// by those that find out first which memory an address means. On the host (tests) it is as good as any.
#ifdef __CUDA_ARCH__
#define GLOBAL(address) __cvta_global_to_generic((unsigned long long)(address))
#else
#define GLOBAL(address) (void *)(address)
#endif

template <class T> struct Pieces {
    const i64 *table;

    // Where row `index` begins, if rows are `width` elements wide.
    __device__ __forceinline__ const T *row(i64 index, i64 width) const {
        const int count = (int)table[0];
        // Counted, not searched: there are few pieces, and the lanes of a warp stay together.
        int piece = 0;
#pragma unroll 1
        for (int k = 1; k < count; ++k) piece += index >= table[1 + k];
        return (const T *)GLOBAL(table[1 + count + piece]) + index * width;
    }

    __device__ __forceinline__ T operator[](i64 index) const { return *row(index, 1); }
};

#define VECTOR(T) const Pieces<T>
#define ROW(vector, index, width) (vector).row(index, width)

#else

#define VECTOR(T) const T *__restrict__
#define ROW(vector, index, width) ((vector) + (index) * (width))

#endif
