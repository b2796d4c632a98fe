// A vector that a kernel reads, whole or (macro IN_PIECES) in pieces that lie apart: in the memory of several devices, or
// pinned on the host. Its table: the number of pieces, where each begins, and where element 0 would lie if each reached
// back to it. Needs philox.cuh before it.

#ifdef IN_PIECES

template <class T> struct Pieces {
    const i64 *table;

    __device__ __forceinline__ T operator[](i64 index) const {
        const i64 count = table[0];
        // Counted, not searched: there are few pieces, and the lanes of a warp stay together.
        i64 piece = 0;
        for (i64 k = 1; k < count; ++k) piece += index >= table[1 + k];
        return ((const T *)table[1 + count + piece])[index];
    }
};

#define VECTOR(T) const Pieces<T>

#else

#define VECTOR(T) const T *__restrict__

#endif
