// Runs GPU kernels on the CPU, to test their arithmetic and their discipline: cuda/device.h includes this for
// -DRWKV_HOST. Blocks run one after the other; the threads of a block are fibers that change places at barriers and
// shuffles only. What a GPU would leave undefined is an error or a NaN here:
//   * a barrier that some threads of the block, or a shuffle that some threads of the warp, do not reach;
//   * shared memory is NaN when a block starts, and lies directly before a page that must not be touched;
//   * an access outside of every tensor, if the caller put the tensors between such pages
//   (tests/support/kernel_host.py);
//   * with another options.order, blocks and fibers run in another order: a missing barrier changes the result.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace rwkv::host {

struct Options {
    int order = 0;  // 0 as numbered, 1 backwards, else a seed for shuffling
    int warp = 32;  // threads that a shuffle needs: 32 as NVIDIA's, 64 as AMD's
    int processors = 1;
    int roughness = 0;  // 1: exp2_fast and reciprocal_fast are wrong by as much as their makers allow
};

inline Options options;

constexpr size_t SHARED_BYTES = 48 * 1024, STACK_BYTES = 256 * 1024;
enum State { READY, AT_SHUFFLE, AT_BARRIER, DONE };

// A stack between two pages that must not be touched, and where to go on.
struct Fiber {
    State state = DONE;
    int thread = 0;
    bool begun = false;
    float value = 0;  // what it gives to a shuffle, then what it gets
    int partner = 0;
    char* stack = nullptr;
    ucontext_t start;
    jmp_buf place;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline int64_t block = 0;
inline char* arena = nullptr;  // shared memory; arena + SHARED_BYTES is the forbidden page
inline char message[256] = "";
inline sigjmp_buf before_fault;
inline void* fault = nullptr;

inline int thread_index() { return current->thread; }
inline int64_t block_index() { return block; }

// Null, or what the last launch did wrong; asking forgets it.
inline const char* error() {
    static char told[sizeof(message)];
    if (!message[0]) return nullptr;
    memcpy(told, message, sizeof(message));
    message[0] = 0;
    return told;
}

template <typename T>
T& shared() {
    static_assert(sizeof(T) <= SHARED_BYTES, "more shared memory than every GPU grants");
    return *reinterpret_cast<T*>(arena + (SHARED_BYTES - sizeof(T)) / 16 * 16);
}

// x moved by `units` in the last place, up or down as its bits have it.
inline float rough(float x, int units) {
    if (!options.roughness || x == 0 || !isfinite(x)) return x;
    uint32_t bits;
    memcpy(&bits, &x, sizeof(x));
    bits += ((bits * 2654435761u) >> 31 ? units : -units) * options.roughness;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

inline char* pages(size_t bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    char* at = static_cast<char*>(
        mmap(nullptr, bytes + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(at, page, PROT_NONE);
    mprotect(at + page + bytes, page, PROT_NONE);
    return at + page;
}

// Gives the processor back to the scheduler until the fiber is READY again.
[[gnu::noinline]] inline void pause(State state) {
    current->state = state;
    if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

inline void sync() { pause(AT_BARRIER); }

inline float shuffle(float x, int partner) {
    Fiber& me = *current;
    me.value = x;
    me.partner = partner;
    pause(AT_SHUFFLE);
    return me.value;
}

inline void run_fiber() {
    for (;;) {
        body();
        pause(DONE);
    }
}

[[gnu::noinline]] inline void resume(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.start);
}

inline void prepare_fiber(Fiber& fiber, int thread) {
    if (!fiber.stack) fiber.stack = pages(STACK_BYTES);
    if (!fiber.begun) {
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack;
        fiber.start.uc_stack.ss_size = STACK_BYTES;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, run_fiber, 0);
    }
    fiber.thread = thread;
    fiber.state = READY;
}

inline std::vector<int64_t> in_order(int64_t count, int64_t salt) {
    std::vector<int64_t> order(count);
    for (int64_t i = 0; i < count; ++i) order[i] = options.order == 1 ? count - 1 - i : i;
    if (options.order > 1) std::shuffle(order.begin(), order.end(), std::mt19937_64(options.order + salt));
    return order;
}

inline int count_of(int first, int last, State state) {
    int count = 0;
    for (int i = first; i < last; ++i) count += fibers[i]->state == state;
    return count;
}

// Lets a warp go on whose threads have all met a shuffle; false if it waits for none.
inline bool exchange(int first, int width) {
    if (count_of(first, first + width, AT_SHUFFLE) != width) return false;
    std::vector<float> given(width);
    for (int i = 0; i < width; ++i) given[i] = fibers[first + i]->value;
    for (int i = 0; i < width; ++i) {
        Fiber& fiber = *fibers[first + i];
        if (fiber.partner / 32 != fiber.thread / 32) {
            snprintf(message, sizeof(message), "block %lld: thread %d shuffles with thread %d, not one of its 32",
                     (long long)block, fiber.thread, fiber.partner);
            return false;
        }
        fiber.value = given[fiber.partner - first];
        fiber.state = READY;
    }
    return true;
}

// One block from start to end; false with a message if its threads wait for each other for ever.
inline bool run_block(int threads) {
    memset(arena, 0xff, SHARED_BYTES);  // NaN as float, -1 as an integer
    for (int i = 0; i < threads; ++i) prepare_fiber(*fibers[i], i);
    for (int64_t turn = 0;; ++turn) {
        for (int64_t i : in_order(threads, turn))
            if (fibers[i]->state == READY) resume(*fibers[i]);
        bool moved = false;
        for (int warp = 0; warp < threads; warp += options.warp) moved |= exchange(warp, options.warp);
        if (message[0]) return false;
        if (moved) continue;
        if (count_of(0, threads, DONE) == threads) return true;
        if (count_of(0, threads, AT_BARRIER) != threads) {
            snprintf(message, sizeof(message),
                     "block %lld is stuck: of its %d threads %d wait at a barrier, %d at a shuffle, %d have ended",
                     (long long)block, threads, count_of(0, threads, AT_BARRIER), count_of(0, threads, AT_SHUFFLE),
                     count_of(0, threads, DONE));
            return false;
        }
        for (int i = 0; i < threads; ++i) fibers[i]->state = READY;
    }
}

inline void caught(int, siginfo_t* info, void*) {
    fault = info->si_addr;
    siglongjmp(before_fault, 1);
}

inline void launch(int64_t blocks, int threads, std::function<void()> kernel) {
    if (message[0]) return;  // as on a GPU, nothing runs after an error
    if (blocks > 0x7fffffff || threads > 1024 || threads % 64) {
        snprintf(message, sizeof(message), "a grid of %lld blocks of %d threads", (long long)blocks, threads);
        return;
    }
    if (!arena) arena = pages(SHARED_BYTES);
    while ((int)fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
    body = std::move(kernel);
    static char* handler_stack = pages(STACK_BYTES);
    struct sigaction action = {}, old[2];
    stack_t own = {handler_stack, 0, STACK_BYTES}, old_stack;
    action.sa_sigaction = caught;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaltstack(&own, &old_stack);
    sigaction(SIGSEGV, &action, &old[0]);
    sigaction(SIGBUS, &action, &old[1]);
    if (sigsetjmp(before_fault, 1) == 0) {
        bool good = true;
        for (int64_t i : in_order(blocks, 0)) {
            block = i;
            if (good) good = run_block(threads);
        }
    } else {
        snprintf(message, sizeof(message), "block %lld, thread %d: access outside of the tensors at 0x%llx",
                 (long long)block, current->thread, (unsigned long long)fault);
    }
    if (message[0])
        for (auto& fiber : fibers) fiber->begun = false;  // their stacks hold kernels that will never end
    sigaction(SIGSEGV, &old[0], nullptr);
    sigaction(SIGBUS, &old[1], nullptr);
    sigaltstack(&old_stack, nullptr);
}

}  // namespace rwkv::host

extern "C" void harness_options(int order, int warp, int processors, int roughness) {
    rwkv::host::options = {order, warp, processors, roughness};
}
