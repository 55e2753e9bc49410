// One token of each of a few rows through blocks of a model on the CPU: a program of operations that a team of threads
// goes through together. The model's own forward pass judges this (tests/model/test_decoding.py).
//
// Every operation is cut into tasks that need nothing of each other, and a sum lies within one task: the result is the
// same for any number of threads. A thread takes the next task that is left, and nobody waits for a thread that has
// none, so a neighbour on one core costs little.
#include "decode_heads.h"

namespace rwkv {
namespace {

// LayerNorm over the width, token shift and mixes. sizes: rows, C, M. `stored`: dtype of `shift`. finish 1: x becomes
// what the first norm makes of it. tensors: x (R, C) | weight and bias of the first norm (null: none), of the norm (C)
// | shift (R, C), replaced (null: no shift) | mixes (M, C) | out (M, R, C) | the normalised x (R, C), or null | the
// difference to the token before (R, C), or null
struct Mix {
    const Op& op;
    int64_t rows, C, M;

    explicit Mix(const Op& x) : op(x), rows(x.sizes[0]), C(x.sizes[1]), M(x.sizes[2]) {}

    int64_t tasks() const { return rows; }

    void norm(const float* x, const float* weight, const float* bias, float* to) const {
        vec total = splat(0), squares = splat(0);
        each(C, [&](int64_t c, auto lanes) { total += load(x + c, lanes); });
        const float mean = sum(total) / static_cast<float>(C);
        each(C, [&](int64_t c, auto lanes) {
            const vec centred = zeros_after(load(x + c, lanes) - mean, lanes);
            squares += centred * centred;
        });
        const float inverse = 1.f / std::sqrt(sum(squares) / static_cast<float>(C) + static_cast<float>(op.eps));
        each(C, [&](int64_t c, auto lanes) {
            const vec normed = (load(x + c, lanes) - mean) * inverse;
            store(to + c, normed * load(weight + c, lanes) + load(bias + c, lanes), lanes);
        });
    }

    template <typename T>
    void shifted(int64_t row, const float* normed, T* shift) const {
        float* difference = op.at<float>(9) ? op.at<float>(9) + row * C : nullptr;
        const int64_t all = rows * C, width = C, mixes = M;
        const float* shares = op.at(6);
        float* out = op.at<float>(7) + row * C;
        shift += row * C;
        each(width, [&](int64_t c, auto lanes) {
            const vec now = load(normed + c, lanes), delta = load(shift + c, lanes) - now;
            store(shift + c, now, lanes);
            if (difference) store(difference + c, delta, lanes);
            for (int64_t m = 0; m < mixes; ++m)
                store(out + m * all + c, now + delta * load(shares + m * width + c, lanes), lanes);
        });
    }

    void run(int64_t row) const {
        float* x = op.at<float>(0) + row * C;
        if (op.at(1)) norm(x, op.at(1), op.at(2), x);
        float* normed = op.at<float>(8) + row * C;
        norm(x, op.at(3), op.at(4), normed);
        if (!op.at(5)) return;
        if (op.stored == BFLOAT16)
            shifted(row, normed, op.at<bf16>(5));
        else
            shifted(row, normed, op.at<float>(5));
    }
};

// y = finish(x W^T). sizes: rows, n, out, whether rows are many. tensors: x (R, n) as Layout leaves it, W (out, n)
// as `stored` says, its scales and levels or null, y (R, out), a gate (R, out) for ADDED_GATED
struct Product {
    const Op& op;
    int64_t rows, n, out;

    explicit Product(const Op& x) : op(x), rows(x.sizes[0]), n(x.sizes[1]), out(x.sizes[2]) {}

    bool many() const { return op.sizes[3] != 0; }
    int64_t tasks() const {
        int64_t found = 0;
        with_matrix(op.stored, nullptr, nullptr, nullptr, n, [&](const auto& matrix) {
            found = product_tasks<std::decay_t<decltype(matrix)>>(rows, out, many());
        });
        return found;
    }

    void run(int64_t task) const {
        float* y = op.at<float>(4);
        const float* gate = op.at(5);
        const int64_t finish = op.finish, width = out;
        const auto put = [=](int64_t row, int64_t o, float value) {
            const int64_t at = row * width + o;
            if (finish == ADDED)
                y[at] += value;
            else if (finish == ADDED_GATED)
                y[at] += gate[at] * value;
            else
                y[at] = finished(finish, value);
        };
        with_matrix(op.stored, op.tensors[1], op.at(2), op.at(3), n,
                    [&](const auto& matrix) { product_task(matrix, op.at(0), rows, out, many(), task, put); });
    }
};

// x (R, n) as a product with a matrix that is `stored` so wants it. sizes: rows, n, whether rows are many. tensors: x,
// the same laid out
struct Layout {
    const Op& op;

    explicit Layout(const Op& x) : op(x) {}

    bool many() const { return op.sizes[2] != 0; }
    int64_t tasks() const {
        int64_t found = 0;
        with_matrix(op.stored, nullptr, nullptr, nullptr, 0, [&](const auto& matrix) {
            found = parts(op.sizes[0], laid_out_rows<std::decay_t<decltype(matrix)>>(many()));
        });
        return found;
    }
    void run(int64_t part) const {
        with_matrix(op.stored, nullptr, nullptr, nullptr, op.sizes[1], [&](const auto& matrix) {
            lay_out<std::decay_t<decltype(matrix)>>(op.at(0), op.sizes[0], matrix.n, many(), part, op.at<float>(1));
        });
    }
};

// y = finish(x W) of M small matrices. sizes: rows, n, out, M, elements of x from one to the next. tensors: x (M, R, n)
// or (R, M, n), W (M, n, out) of `stored`, y (M, R, out)
struct LowRank {
    const Op& op;
    int64_t rows, n, out, M, next_row, next_matrix;

    explicit LowRank(const Op& x)
        : op(x),
          rows(x.sizes[0]),
          n(x.sizes[1]),
          out(x.sizes[2]),
          M(x.sizes[3]),
          next_row(x.sizes[4]),
          next_matrix(x.sizes[5]) {}

    int64_t tasks() const { return M * parts(out, COLUMNS) * parts(rows, ROWS); }

    void run(int64_t task) const {
        const int64_t chunks = parts(rows, ROWS), tiles = parts(out, COLUMNS);
        const int64_t first = task % chunks * ROWS, count = std::min<int64_t>(ROWS, rows - first);
        const int64_t c = task / chunks % tiles * COLUMNS, m = task / chunks / tiles;
        const int64_t width = std::min<int64_t>(COLUMNS, out - c);
        const float* x = op.at(0) + m * next_matrix + first * next_row;
        float* y = op.at<float>(2) + (m * rows + first) * out + c;
        by_stored(op, [&](auto type) {
            const auto* w = static_cast<decltype(type)>(op.tensors[1]) + m * n * out + c;
            some_columns(x, next_row, count, w, out, n, y, out, width);
        });
        if (op.finish == PLAIN) return;
        for (int64_t r = 0; r < count; ++r)
            for (int64_t i = 0; i < width; ++i) y[r * out + i] = finished(op.finish, y[r * out + i]);
    }
};

// RWKV-6: the inputs of the matrices, from shares (M, R, C) that depend on the token. sizes: rows, C, M.
// tensors: shares, replaced by x + difference (share + always) | always (M, C) | x, difference (R, C)
struct Shares6 {
    const Op& op;
    int64_t rows, C, M;

    explicit Shares6(const Op& x) : op(x), rows(x.sizes[0]), C(x.sizes[1]), M(x.sizes[2]) {}

    int64_t tasks() const { return rows * M; }

    void run(int64_t task) const {
        const int64_t row = task % rows, m = task / rows;
        float* out = op.at<float>(0) + task * C;
        const float *always = op.at(1) + m * C, *x = op.at(2) + row * C, *difference = op.at(3) + row * C;
        each(C, [&](int64_t c, auto lanes) {
            const vec share = load(out + c, lanes) + load(always + c, lanes);
            store(out + c, load(x + c, lanes) + load(difference + c, lanes) * share, lanes);
        });
    }
};

// f(the operation) by its number in ops/decode.py
template <typename F>
void with_kind(const Op& op, const F& f) {
    switch (op.kind) {
        case 0:
            return f(Mix(op));
        case 1:
            return f(Product(op));
        case 2:
            return f(LowRank(op));
        case 3:
            return f(Shares6(op));
        case 4:
            return f(Heads7(op));
        case 5:
            return f(Heads6(op));
        case 6:
            return f(Channels4(op));
        case 7:
            return f(Layout(op));
    }
}

// The state of an operation that runs, on cache lines of its own.
struct alignas(64) Progress {
    std::atomic<int64_t> next{0};
    int64_t tasks = 0, before = 0;  // before: tasks of all operations that come before it
};

inline void wait_for(const std::atomic<int64_t>& finished_tasks, int64_t goal) {
    for (int turns = 0; finished_tasks.load(std::memory_order_acquire) < goal; ++turns) {
        if (turns > 2000) {
            std::this_thread::yield();
        } else {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }
}

}  // namespace

// records of `Op` | their number
RWKV_EXPORT rwkv_decode(const void* records, const int64_t* numbers, int, int threads) {
    const Op* ops = static_cast<const Op*>(records);
    const int64_t count = numbers[0];
    const std::unique_ptr<Progress[]> progress(new Progress[count]);
    int64_t total = 0, widest = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (ops[i].kind < 0 || ops[i].kind > 7) return "no such operation";
        progress[i].before = total;
        with_kind(ops[i], [&](const auto& op) { progress[i].tasks = op.tasks(); });
        total += progress[i].tasks, widest = std::max(widest, progress[i].tasks);
    }
    struct alignas(64) {
        std::atomic<int64_t> tasks{0};
    } finished_ones;
    on_team(widest < 4 ? 1 : threads, [&](int, int) {
        for (int64_t i = 0; i < count; ++i) {
            if (ops[i].after) wait_for(finished_ones.tasks, progress[i].before);
            with_kind(ops[i], [&](const auto& op) {
                for (int64_t task;
                     (task = progress[i].next.fetch_add(1, std::memory_order_relaxed)) < progress[i].tasks;) {
                    op.run(task);
                    finished_ones.tasks.fetch_add(1, std::memory_order_release);
                }
            });
        }
    });
    return nullptr;
}

}  // namespace rwkv
