// A vector that a kernel reads, whole or (macro IN_PIECES) in pieces that lie apart: in the memory of several devices, or
// pinned on the host. Its table: the number of pieces, where each begins, and where element 0 would lie if each reached
// back to it. Needs the types of its includer.

#ifdef IN_PIECES

template <class T> struct Pieces {
    const i64 *table;

    // Where row `index` begins, if rows are `width` elements wide.
    __device__ __forceinline__ const T *row(i64 index, i64 width) const {
        const i64 count = table[0];
        // Counted, not searched: there are few pieces, and the lanes of a warp stay together.
        i64 piece = 0;
        for (i64 k = 1; k < count; ++k) piece += index >= table[1 + k];
        return (const T *)table[1 + count + piece] + index * width;
    }

    __device__ __forceinline__ T operator[](i64 index) const { return *row(index, 1); }
};

#define VECTOR(T) const Pieces<T>
#define ROW(vector, index, width) (vector).row(index, width)

#else

#define VECTOR(T) const T *__restrict__
#define ROW(vector, index, width) ((vector) + (index) * (width))

#endif
