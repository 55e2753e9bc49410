// Threads of the OpenMP library that torch has loaded, so that there is one team for both: a second one would fight
// for the same cores. It is called by its C functions, which GNU's library and LLVM's both have, and nothing is linked:
// they are found in the process (ops/cpu.py sees to it), and where there are none everything runs on one thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "../call.h"

extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
}

namespace rwkv {

inline bool has_team() { return GOMP_parallel && omp_get_thread_num && omp_get_num_threads; }

// work(its number, how many there are) on each thread of a team of at most `threads`.
template <typename Work>
void on_team(int threads, const Work& work) {
    if (threads <= 1 || !has_team()) return work(0, 1);
    GOMP_parallel([](void* data) { (*static_cast<const Work*>(data))(omp_get_thread_num(), omp_get_num_threads()); },
                  const_cast<Work*>(&work), threads, 0);
}

struct Nothing {};  // for work without scratch

// work(task, scratch) for every task, the next one to whichever thread is free; each thread with a scratch of its own.
template <typename Scratch, typename Work>
void for_tasks(int threads, int64_t tasks, const Work& work) {
    const int team = static_cast<int>(std::clamp<int64_t>(tasks, 1, std::max(threads, 1)));
    const std::unique_ptr<Scratch[]> scratch(new Scratch[team]);  // here: nothing may throw on a team's thread
    std::atomic<int64_t> next{0};
    on_team(team, [&](int thread, int) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(task, scratch[thread]);
    });
}

}  // namespace rwkv

// Whether the process has a team to run on.
RWKV_PUBLIC inline int rwkv_has_team() { return rwkv::has_team(); }
