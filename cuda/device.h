// One way to write a GPU kernel for three compilers: nvcc (CUDA), hipcc (AMD) and, for tests, an ordinary C++ compiler
// with -DRWKV_HOST, where tests/support/kernel_host.h runs blocks and threads on the CPU.
//
// How a file cuda/<op>.cu is made (cuda/wkv7.cu is the model):
//   * `template <...> __global__ void BOUNDS(threads, registers) name(Arguments x)`: the compiler may use as many
//     registers per thread. Grids and blocks have one axis: block_index(), thread_index(). Blocks have a multiple of 64
//     threads, so warps of 32 or 64 are always full.
//   * Shared memory is one struct: `SHARED(Stage, stage);`, once per kernel. It starts undefined (NaN in tests).
//   * sync() is met by all threads of a block, a shuffle by all threads of a warp; partners of a shuffle lie within 32
//     threads, because 32 (NVIDIA) and 64 (AMD) must give the same result.
//   * Offsets into tensors are int64_t. No atomics: results are repeatable to the bit.
//   * Memory is read and written with load<n> and store<n>: n consecutive numbers of type float or bf16, as float,
//     in one access (the address must be a multiple of its size; all tensors begin at a multiple of 16).
//   * The file ends with two C functions, called by ops/gpu.py, where the table LAYOUTS names the tensors:
//         RWKV_EXPORT rwkv_forward(void* const* tensors, const int64_t* sizes, int dtype, int device, void* stream)
//         RWKV_EXPORT rwkv_backward(same)
//     tensors: forward: inputs, state, places | y, final state | kept (null when backward will not run)
//              backward: inputs, kept, places, dy, gradient of the final state | gradients of the inputs and of the
//              initial state | scratch.   Per-token tensors are (tokens, H, N), or (tokens, C) for wkv4.
//     They queue kernels on `stream`, allocate nothing, never wait, and return null or the text of an error.
#pragma once

#include <stdint.h>

#if defined(RWKV_HOST)
#include "kernel_host.h"
#elif defined(__HIP__)
#include <hip/hip_runtime.h>
#else
#include <cuda_runtime.h>
#endif

#define DEVICE __device__ __forceinline__
#define RWKV_EXPORT extern "C" __attribute__((visibility("default"))) const char*

namespace rwkv {

// ---------------------------------------------------------------- what differs between the three

#if defined(RWKV_HOST)

using Stream = void*;
#define BOUNDS(threads, registers)
#define SHARED(Type, name) Type& name = host::shared<Type>()
inline int thread_index() { return host::thread_index(); }
inline int64_t block_index() { return host::block_index(); }
inline void sync() { host::sync(); }
inline float shuffle_xor(float x, int mask) { return host::shuffle(x, host::thread_index() ^ mask); }
inline float exp2_fast(float x) { return host::rough(exp2f(x), 2); }
inline float reciprocal_fast(float x) { return host::rough(1.f / x, 1); }
inline int processors(int) { return host::options.processors; }

template <typename... P, typename... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, Stream, A... arguments) {
    host::launch(blocks, threads, [&] { kernel(arguments...); });
}

// Makes `device` the current one for as long as this lives.
struct OnDevice {
    explicit OnDevice(int) {}
    const char* error() const { return host::error(); }
};

#else

#if defined(__HIP__)
#define RWKV_API(name) hip##name
#else
#define RWKV_API(name) cuda##name
#endif

using Stream = RWKV_API(Stream_t);
#define SHARED(Type, name) __shared__ Type name
DEVICE int thread_index() { return threadIdx.x; }
DEVICE int64_t block_index() { return blockIdx.x; }
DEVICE void sync() { __syncthreads(); }

// The second number of __launch_bounds__ is that of blocks for each multiprocessor (65536 registers) to nvcc, that of
// wavefronts for each SIMD unit (at least 256 registers per lane) to hipcc: always two, so that one can wait.
#if defined(__HIP__)
#define BOUNDS(threads, registers) __launch_bounds__(threads, (registers) < 128 ? 256 / (registers) : 2)
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor(x, mask, 32); }
DEVICE float exp2_fast(float x) { return __builtin_exp2f(x); }  // v_exp_f32
DEVICE float reciprocal_fast(float x) { return __builtin_amdgcn_rcpf(x); }
#else
#define BOUNDS(threads, registers) __launch_bounds__(threads, 65536 / ((threads) * (registers)))
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask, 32); }
DEVICE float exp2_fast(float x) {  // within 2 units in the last place; results below 2^-126 are 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal_fast(float x) {  // within 1 unit in the last place
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

// Multiprocessors (compute units) of a device.
inline int processors(int device) {
    int count = 1;
    (void)RWKV_API(DeviceGetAttribute)(&count,
#if defined(__HIP__)
                                       hipDeviceAttributeMultiprocessorCount,
#else
                                       cudaDevAttrMultiProcessorCount,
#endif
                                       device);
    return count;
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, Stream stream, A... arguments) {
    if (blocks > 0) kernel<<<dim3((unsigned)blocks), dim3(threads), 0, stream>>>(arguments...);
}

struct OnDevice {
    int before = 0;
    decltype(RWKV_API(Success)) status;
    explicit OnDevice(int device) {
        status = RWKV_API(GetDevice)(&before);
        if (status == RWKV_API(Success)) status = RWKV_API(SetDevice)(device);
    }
    ~OnDevice() { (void)RWKV_API(SetDevice)(before); }
    // Null, or what went wrong when the device was chosen or since then.
    const char* error() const {
        const auto last = status == RWKV_API(Success) ? RWKV_API(GetLastError)() : status;
        return last == RWKV_API(Success) ? nullptr : RWKV_API(GetErrorString)(last);
    }
};

#endif

// ---------------------------------------------------------------- numbers in memory

struct bf16 {
    uint16_t bits;
};

DEVICE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

DEVICE uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(x));
    return bits;
}

DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return from_bits((uint32_t)x.bits << 16); }

DEVICE void narrow(float x, float& to) { to = x; }
// Nearest, ties to even. A NaN keeps its upper bits and is made quiet, as rounding could carry it into infinity.
DEVICE void narrow(float x, bf16& to) {
    const uint32_t bits = to_bits(x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to.bits = (uint16_t)(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// COUNT numbers side by side, aligned so that a copy is one access of up to 16 bytes.
template <int COUNT, typename T = float>
struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Pack {
    T at[COUNT];
    DEVICE const T& operator[](int i) const { return at[i]; }
    DEVICE T& operator[](int i) { return at[i]; }
};

template <int COUNT, typename T>
DEVICE Pack<COUNT> load(const T* from) {
    const Pack<COUNT, T> raw = *reinterpret_cast<const Pack<COUNT, T>*>(from);
    Pack<COUNT> x;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) x[i] = widen(raw[i]);
    return x;
}

template <int COUNT, typename T>
DEVICE void store(T* to, const Pack<COUNT>& x) {
    Pack<COUNT, T> raw;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) narrow(x[i], raw[i]);
    *reinterpret_cast<Pack<COUNT, T>*>(to) = raw;
}

template <typename T>
DEVICE void store(T* to, float x) {
    narrow(x, *to);
}

// ---------------------------------------------------------------- sums over threads

// Sum of x over the threads of a warp whose indices differ only in bits FIRST, 2 FIRST .. END / 2 (END <= 32): every
// one of them gets the same bits.
template <int FIRST, int END>
DEVICE float sum_over(float x) {
#pragma unroll
    for (int mask = FIRST; mask < END; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}

// The same for COUNT numbers, with each thread keeping one sum: that of x[owned<COUNT, FIRST, END>(thread)]. A number
// crosses between two threads once, where COUNT calls of sum_over would move it log2(END / FIRST) times.
template <int COUNT, int FIRST, int END>
DEVICE float scatter_sum(const float (&x)[COUNT]) {
    if constexpr (COUNT == 1) {
        return sum_over<FIRST, END>(x[0]);
    } else {
        static_assert(FIRST < END, "more sums than threads");
        const bool upper = thread_index() & FIRST;
        float kept[COUNT / 2];
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) {
            // Two numbers first, then the choice: a choice between two places would keep x out of registers (clang).
            const float low = x[i], high = x[i + COUNT / 2];
            kept[i] = (upper ? high : low) + shuffle_xor(upper ? low : high, FIRST);
        }
        return scatter_sum<COUNT / 2, FIRST * 2, END>(kept);
    }
}

template <int COUNT, int FIRST, int END>
DEVICE int owned(int thread) {
    int index = 0;
#pragma unroll
    for (int half = COUNT / 2, mask = FIRST; half > 0; half /= 2, mask *= 2) index += thread & mask ? half : 0;
    return index;
}

// Whether a thread is the one that writes its sum: several get the same if there are more threads than sums.
template <int COUNT, int FIRST, int END>
DEVICE bool writes(int thread) {
    return (thread & (END - 1) & ~(FIRST * COUNT - 1)) == 0;
}

// ---------------------------------------------------------------- arguments

// sizes, as ops/gpu.py gives them. For wkv4, size is the number of channels C and heads is 1.
struct Sizes {
    int64_t tokens, rows, heads, size;
    int64_t intervals;  // of all rows together
    int64_t interval;   // tokens between checkpoints
};

inline Sizes sizes_of(const int64_t* x) { return {x[0], x[1], x[2], x[3], x[4], x[5]}; }

// places, int64 (3, rows + 1): where each row begins among the tokens and where among the intervals, both with a last
// entry for the end; then the rows from the longest to the shortest, so that the last blocks to finish are short.
struct Places {
    const int64_t *starts, *marks, *order;
    int64_t rows;

    Places(const void* places, const Sizes& sizes) : rows(sizes.rows) {
        starts = static_cast<const int64_t*>(places);
        marks = starts + rows + 1;
        order = marks + rows + 1;
    }

    // The row that an interval belongs to.
    DEVICE int64_t row_of(int64_t interval) const {
        int64_t low = 0, high = rows;  // marks[low] <= interval < marks[high]
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            if (marks[middle] <= interval)
                low = middle;
            else
                high = middle;
        }
        return low;
    }
};

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1 };

// The i-th tensor of a call.
template <typename T>
T* tensor(void* const* tensors, int i) {
    return static_cast<T*>(tensors[i]);
}

template <int VALUE>
struct Constant {
    static constexpr int value = VALUE;
};

// f(Constant<N>, a T) for the head size and dtype of a call; null, or why there is no kernel for them.
template <typename F>
const char* dispatch(const Sizes& sizes, int dtype, F&& f) {
    const auto with_size = [&](auto element) -> const char* {
        switch (sizes.size) {
            case 32: return f(Constant<32>{}, element), nullptr;
            case 64: return f(Constant<64>{}, element), nullptr;
            case 128: return f(Constant<128>{}, element), nullptr;
        }
        return "the head size is not one of 32, 64, 128";
    };
    if (dtype == FLOAT32) return with_size(float{});
    if (dtype == BFLOAT16) return with_size(bf16{});
    return "the dtype is neither float32 nor bfloat16";
}

static __global__ void probe() {}

}  // namespace rwkv

// Null if this binary has code that runs on the device, else why not: a call that ops/gpu.py makes once.
RWKV_EXPORT rwkv_probe(int device) {
    const rwkv::OnDevice here(device);
    if (const char* failure = here.error()) return failure;
    rwkv::launch(rwkv::probe, 1, 64, rwkv::Stream{});
    return here.error();
}
