// One decoding step of a MiniMind on a CPU: every layer, for a few sequences, one new token each.
//
// Decoding reads every weight once for each step, so all that matters at batch 1 is to stream them at the speed of the
// memory, and at batch 16 to use each of them sixteen times while it is in a register. A framework that runs an operator
// at a time pays more for the hundred small operators between the large ones than for the work; here the whole step is
// one parallel region with five barriers a layer.
//
// Numbers: weights are float32, bfloat16 or int8 with one scale for each output; keys and values float32 or bfloat16;
// everything else is float32. Every output is summed over the inputs in the same order, whatever the number of rows:
// what a row computes does not depend, to the bit, on which other rows there are.
//
// Plain C++17 with the vector extensions of GCC and Clang, no PyTorch headers: it compiles in seconds for any CPU.
// decode.py compiles it, lays out the weights, and mirrors the structs below.

#include "kernel.hpp"

#include <atomic>
#include <omp.h>
#include <thread>

namespace {

constexpr int PIECE = 4;  // blocks of LANES outputs that a thread takes at a time
constexpr int MAX_ROWS = 256;
constexpr int SLAB = 512;  // inputs that are worked on at a time: of 16 rows they fit into the nearest cache
#if defined(__AVX512F__)
constexpr int ROWS = 16;  // rows that one pass over a block of weights serves: their sums must fit into registers
#else
constexpr int ROWS = 4;
#endif

}  // namespace

// ---- structs that Python fills in

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// A weight (outputs, inputs) as [outputs / 16][inputs][16], the last block filled up with zeros.
struct Matrix {
    const void* data;
    const float* scale;  // (outputs rounded up,) of int8
    int32_t kind, blocks, inputs, unused;
};

struct Experts {  // SwiGLU: w2(silu(w1 x) * w3 x)
    Matrix w1, w3, w2;
};

struct Layer {
    const float *attention_norm, *ffn_norm;
    const float *q_norm, *k_norm;  // (head_dim,), or null
    Matrix qkv, wo;
    const float* gate;       // (routed, dim), or null
    const Experts* routed;   // of them `n_routed`
    Experts shared;          // the feed-forward, or the shared experts; w1.blocks 0: none
    void *keys, *values;     // (rows, kv_heads, max_len, head_dim)
};

struct Model {
    const void* embedding;  // (vocab, dim)
    const float *norm, *cos, *sin;  // tables (max_len, head_dim / 2)
    const Layer* layers;
    Matrix output;
    int32_t embedding_kind, cache_kind;
    int32_t dim, n_layers, n_heads, n_kv_heads, head_dim, max_len;
    int32_t n_routed, top_k, renormalise;
    float eps;
    float* scratch;  // see `scratch_floats`
};

namespace {

// ---- matrix products

struct Row {  // out += or = factor * (W in)
    const float* in;
    float* out;
    float factor;
};

// sums[r][b] += weights[b] * in[r] over `slab` inputs; the rows of `in` are SLAB + LANES apart, blocks `apart` weights.
template <class T, int R, int B>
inline void tile(const T* weights, size_t apart, const float* in, int slab, floats (*sums)[PIECE]) {
    floats total[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) total[r][b] = sums[r][b];
    for (int k = 0; k < slab; k++)
        for (int b = 0; b < B; b++) {
            const floats w = load(weights + b * apart + size_t(k) * LANES);
            for (int r = 0; r < R; r++) total[r][b] += w * in[r * (SLAB + LANES) + k];
        }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) sums[r][b] = total[r][b];
}

// The outputs of the blocks `from` to `to` for R rows, B blocks at a time: R * B sums must fit into registers.
template <class T, int R, int B>
void strip(const Matrix& w, const Row* rows, int from, int to, bool add) {
    const size_t apart = size_t(w.inputs) * LANES;
    floats sums[R][PIECE] = {};
    float copy[R][SLAB + LANES];  // so that the compiler knows how far the rows are from each other
    for (int k = 0; k < w.inputs; k += SLAB) {
        const int slab = std::min(SLAB, w.inputs - k);
        const float* in = rows[0].in + k;
        if (R > 1) {
            for (int r = 0; r < R; r++) std::memcpy(copy[r], rows[r].in + k, slab * sizeof(float));
            in = copy[0];
        }
        int block = from;
        const T* data = static_cast<const T*>(w.data) + size_t(k) * LANES;
        for (; block + B <= to; block += B) tile<T, R, B>(data + block * apart, apart, in, slab, reinterpret_cast<floats (*)[PIECE]>(&sums[0][block - from]));
        for (; block < to; block++) tile<T, R, 1>(data + block * apart, apart, in, slab, reinterpret_cast<floats (*)[PIECE]>(&sums[0][block - from]));
    }
    for (int r = 0; r < R; r++)
        for (int block = from; block < to; block++) {
            float* out = rows[r].out + block * LANES;
            floats y = sums[r][block - from] * rows[r].factor;
            if (w.scale) y *= load(w.scale + block * LANES);
            store(out, add ? load(out) + y : y);
        }
}

template <class T>
void multiply(const Matrix& w, const Row* rows, int n, int from, int to, bool add) {
    int r = 0;
    if constexpr (ROWS >= 16)
        for (; r + 16 <= n; r += 16) strip<T, 16, 1>(w, rows + r, from, to, add);
    if constexpr (ROWS >= 8)
        for (; r + 8 <= n; r += 8) strip<T, 8, 2>(w, rows + r, from, to, add);
    for (; r + 4 <= n; r += 4) strip<T, 4, ROWS / 4>(w, rows + r, from, to, add);
    for (; r + 2 <= n; r += 2) strip<T, 2, ROWS / 4>(w, rows + r, from, to, add);
    for (; r < n; r++) strip<T, 1, PIECE>(w, rows + r, from, to, add);
}

// The part of all outputs that belongs to one piece of work, for all rows: so its weights come from the memory once.
void multiply(const Matrix& w, const Row* rows, int n, int piece, bool add) {
    const int from = piece * PIECE, to = std::min(from + PIECE, w.blocks);
    if (w.kind == INT8) multiply<int8_t>(w, rows, n, from, to, add);
    else if (w.kind == BFLOAT16) multiply<bf16>(w, rows, n, from, to, add);
    else multiply<float>(w, rows, n, from, to, add);
}

// ---- the parts of a layer

void rms_norm(const float* x, const float* weight, float* out, int dim, float eps) {
    float squares = 0;
    int i = 0;
    floats sums = {};
    for (; i + LANES <= dim; i += LANES) sums += load(x + i) * load(x + i);
    squares = sum(sums);
    for (; i < dim; i++) squares += x[i] * x[i];
    float factor = 1 / std::sqrt(squares / dim + eps);
    for (i = 0; i < dim; i++) out[i] = x[i] * factor * weight[i];
}

void swiglu(float* gate, const float* up, int from, int to) {  // gate = silu(gate) * up
    for (int i = from; i < to; i += LANES) store(gate + i, silu(load(gate + i)) * load(up + i));
}

void rotate(float* x, const float* cos, const float* sin, int head_dim) {
    for (int i = 0; i < head_dim / 2; i++) {
        float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cos[i] - b * sin[i];
        x[2 * i + 1] = a * sin[i] + b * cos[i];
    }
}

// G query heads that share a key/value head, of one row: out = softmax(q keys / sqrt(head_dim)) values.
// q, out (G, head_dim); keys, values (length, head_dim); scores (G, stride) to work in.
template <class T, int V, int G>  // V = head_dim / 16
void attention(const float* q, const T* keys, const T* values, int length, float* scores, int stride, float* out) {
    constexpr int D = V * LANES;
    const float scale = 1 / std::sqrt(float(D));
    floats query[G][V];
    float top[G];
    for (int g = 0; g < G; g++) {
        for (int i = 0; i < V; i++) query[g][i] = load(q + g * D + i * LANES) * scale;
        top[g] = -INFINITY;
    }
    for (int t = 0; t < length; t++) {
        floats key[V];
        for (int i = 0; i < V; i++) key[i] = load(keys + size_t(t) * D + i * LANES);
        for (int g = 0; g < G; g++) {
            floats dot = query[g][0] * key[0];
            for (int i = 1; i < V; i++) dot += query[g][i] * key[i];
            const float score = sum(dot);
            scores[g * stride + t] = score;
            top[g] = std::max(top[g], score);
        }
    }
    float share[G];
    for (int g = 0; g < G; g++) {
        float* score = scores + g * stride;
        for (int t = length; t % LANES; t++) score[t] = -INFINITY;  // its weight becomes 0
        floats total = {};
        for (int t = 0; t < length; t += LANES) {
            const floats p = exp(load(score + t) - top[g]);
            store(score + t, p);
            total += p;
        }
        share[g] = 1 / sum(total);
    }
    floats mix[2][G][V] = {};  // of even and odd positions: twice as many sums for the processor to work on at a time
    for (int t = 0; t < length; t++) {
        floats(&here)[G][V] = mix[t % 2];
        for (int i = 0; i < V; i++) {
            const floats value = load(values + size_t(t) * D + i * LANES);
            for (int g = 0; g < G; g++) here[g][i] += scores[g * stride + t] * value;
        }
    }
    for (int g = 0; g < G; g++)
        for (int i = 0; i < V; i++) store(out + g * D + i * LANES, (mix[0][g][i] + mix[1][g][i]) * share[g]);
}

template <class T, int V>
void attend_heads(const float* q, const T* keys, const T* values, int length, int heads, float* scores, int stride,
                  float* out) {
    int h = 0;
    for (; h + 2 <= heads; h += 2)
        attention<T, V, 2>(q + h * V * LANES, keys, values, length, scores, stride, out + h * V * LANES);
    for (; h < heads; h++)
        attention<T, V, 1>(q + h * V * LANES, keys, values, length, scores, stride, out + h * V * LANES);
}

template <class T>
void attend_any(int head_dim, const float* q, const T* keys, const T* values, int length, int heads, float* scores,
                int stride, float* out) {
    switch (head_dim / LANES) {
        case 1: return attend_heads<T, 1>(q, keys, values, length, heads, scores, stride, out);
        case 2: return attend_heads<T, 2>(q, keys, values, length, heads, scores, stride, out);
        case 3: return attend_heads<T, 3>(q, keys, values, length, heads, scores, stride, out);
        case 4: return attend_heads<T, 4>(q, keys, values, length, heads, scores, stride, out);
        case 5: return attend_heads<T, 5>(q, keys, values, length, heads, scores, stride, out);
        case 6: return attend_heads<T, 6>(q, keys, values, length, heads, scores, stride, out);
        case 8: return attend_heads<T, 8>(q, keys, values, length, heads, scores, stride, out);
    }
}

// Mixing weights of one row: softmax over the experts, then the `top_k` largest (of equal ones the first), others 0.
void choose_experts(const Model& m, const float* gate, const float* x, float* weights) {
    float top = -INFINITY, total = 0, kept = 0;
    for (int e = 0; e < m.n_routed; e++) {
        float score = 0;
        floats sums = {};
        int i = 0;
        for (; i + LANES <= m.dim; i += LANES) sums += load(gate + e * m.dim + i) * load(x + i);
        score = sum(sums);
        for (; i < m.dim; i++) score += gate[e * m.dim + i] * x[i];
        weights[e] = score;
        top = std::max(top, score);
    }
    for (int e = 0; e < m.n_routed; e++) total += weights[e] = std::exp(weights[e] - top);
    for (int e = 0; e < m.n_routed; e++) weights[e] /= total;
    float* chosen = weights + m.n_routed;
    std::fill(chosen, chosen + m.n_routed, 0.0f);
    for (int i = 0; i < m.top_k; i++) {
        int best = -1;
        for (int e = 0; e < m.n_routed; e++)
            if (chosen[e] == 0 && (best < 0 || weights[e] > weights[best])) best = e;
        chosen[best] = std::max(weights[best], 1e-30f);
        kept += weights[best];
    }
    for (int e = 0; e < m.n_routed; e++) weights[e] = m.renormalise ? chosen[e] / (kept + 1e-20f) : chosen[e];
}

// Store a row's new key or value, x (kv_heads, head_dim), in its slot of `kv` (slots, kv_heads, max_len, head_dim).
void keep(const Model& m, void* kv, const float* x, int64_t slot, int64_t position) {
    for (int h = 0; h < m.n_kv_heads; h++) {
        const size_t at = ((slot * m.n_kv_heads + h) * m.max_len + position) * m.head_dim;
        for (int i = 0; i < m.head_dim; i++)
            if (m.cache_kind == FLOAT32) static_cast<float*>(kv)[at + i] = x[h * m.head_dim + i];
            else store(static_cast<bf16*>(kv) + at + i, x[h * m.head_dim + i]);
    }
}

int up(int n) { return (n + LANES - 1) / LANES * LANES; }

struct Scratch {  // sizes in floats, for `rows` rows
    size_t residual, qkv, mixed, hidden, mixing, normed, scores;
    Scratch(const Model& m, int rows) {
        int widest = 0;
        for (int l = 0; l < m.n_layers; l++) {
            const Layer& layer = m.layers[l];
            int width = layer.shared.w1.blocks * LANES;
            if (layer.gate) width += m.top_k * layer.routed[0].w1.blocks * LANES;
            widest = std::max(widest, width);
        }
        residual = size_t(rows) * up(m.dim);
        qkv = size_t(rows) * m.layers[0].qkv.blocks * LANES;
        mixed = size_t(rows) * up(m.n_heads * m.head_dim);
        hidden = size_t(rows) * widest * 2;
        mixing = size_t(rows) * m.n_routed * 2;
        normed = size_t(rows) * up(m.dim);                           // of each thread
        scores = size_t(2) * up(m.max_len);     // of each thread: see `attention`
    }
};

// The threads of a step divide each phase into small pieces: a free thread takes the next one. A thread that the system
// has suspended delays the others only if it was in the middle of a piece, and then once; with equal shares and a
// barrier after each phase, all would wait for it dozens of times a step.
class Phases {
public:
    static constexpr int MOST = 1024;
    void reset(int n) {
        for (int i = 0; i < n; i++) taken[i].store(0), finished[i].store(0);
    }
    // Run `work(piece)` for all pieces of phase `p`, together with the other threads; `begin()` before the first.
    template <class Begin, class Work>
    void run(int p, int pieces, Begin begin, Work work) {
        int done = 0;
        for (int piece; (piece = taken[p].fetch_add(1, std::memory_order_relaxed)) < pieces; done++) {
            if (done == 0) begin();
            work(piece);
        }
        if (done) finished[p].fetch_add(done, std::memory_order_release);
        for (int spins = 0; finished[p].load(std::memory_order_acquire) < pieces; spins++)
            if (spins > 20000) std::this_thread::yield();
            else pause();
    }
private:
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    std::atomic<int> taken[MOST], finished[MOST];
};

}  // namespace

extern "C" size_t scratch_floats(const Model* m, int rows, int threads) {
    Scratch s(*m, rows);
    return s.residual + s.qkv + s.mixed + s.hidden + s.mixing + threads * (s.normed + s.scores);
}

// Rows are tokens at a position of a sequence, which has a slot in the cache. Keys and values of all rows are stored
// before any row attends, so rows may be the newest tokens of many sequences, or all tokens of a prompt, or both.
//
// tokens, positions, slots (rows,); ends (n_ends,): rows whose logits are wanted -> logits (n_ends, output.blocks * 16).
extern "C" void decode_step(const Model* model, int rows, const int64_t* tokens, const int64_t* positions,
                            const int64_t* slots, int n_ends, const int64_t* ends, float* logits, int threads) {
    const Model& m = *model;
    const Scratch size(m, rows);
    const int width = up(m.dim), group = m.n_heads / m.n_kv_heads, q_dim = m.n_heads * m.head_dim;
    const int kv_dim = m.n_kv_heads * m.head_dim, qkv_width = m.layers[0].qkv.blocks * LANES, mixed_width = up(q_dim);
    float* x = m.scratch;
    float* qkv = x + size.residual;
    float* mixed = qkv + size.qkv;
    float* hidden = mixed + size.mixed;
    float* mixing = hidden + size.hidden;  // weights of the experts, see `choose_experts`
    float* of_threads = mixing + size.mixing;
    Phases phases;
    phases.reset(m.n_layers * 7 + 2);

#pragma omp parallel num_threads(threads)
    {
        float* normed = of_threads + omp_get_thread_num() * (size.normed + size.scores);
        float* scores = normed + size.normed;
        Row line[MAX_ROWS];
        int phase = 0;
        auto pieces = [](int blocks) { return (blocks + PIECE - 1) / PIECE; };
        auto nothing = [] {};
        auto norm_with = [&](const float* weight) {
            for (int r = 0; r < rows; r++) rms_norm(x + r * width, weight, normed + r * width, m.dim, m.eps);
        };

        phases.run(phase++, rows, nothing, [&](int r) {
            const size_t at = size_t(tokens[r]) * m.dim;
            for (int i = 0; i < m.dim; i++)
                x[r * width + i] = m.embedding_kind == FLOAT32 ? static_cast<const float*>(m.embedding)[at + i]
                                                               : widen(static_cast<const bf16*>(m.embedding)[at + i]);
        });
        for (int l = 0; l < m.n_layers; l++) {
            const Layer& layer = m.layers[l];

            phases.run(phase++, pieces(layer.qkv.blocks), [&] { norm_with(layer.attention_norm); }, [&](int piece) {
                for (int r = 0; r < rows; r++) line[r] = {normed + r * width, qkv + r * qkv_width, 1};
                multiply(layer.qkv, line, rows, piece, false);
            });

            phases.run(phase++, rows, nothing, [&](int r) {
                const float* cos = m.cos + size_t(positions[r]) * m.head_dim / 2;
                const float* sin = m.sin + size_t(positions[r]) * m.head_dim / 2;
                float* heads = qkv + size_t(r) * qkv_width;
                for (int h = 0; h < m.n_heads + m.n_kv_heads; h++) {
                    float* head = heads + h * m.head_dim;
                    const float* norm = h < m.n_heads ? layer.q_norm : layer.k_norm;
                    if (norm) rms_norm(head, norm, head, m.head_dim, m.eps);
                    rotate(head, cos, sin, m.head_dim);
                }
                keep(m, layer.keys, heads + q_dim, slots[r], positions[r]);
                keep(m, layer.values, heads + q_dim + kv_dim, slots[r], positions[r]);
            });

            phases.run(phase++, rows * m.n_kv_heads, nothing, [&](int piece) {
                const int r = piece / m.n_kv_heads, head = piece % m.n_kv_heads;
                const float* q = qkv + size_t(r) * qkv_width + head * group * m.head_dim;
                float* out = mixed + size_t(r) * mixed_width + head * group * m.head_dim;
                const size_t at = (slots[r] * m.n_kv_heads + head) * m.max_len * m.head_dim;
                const int length = int(positions[r]) + 1, stride = up(m.max_len);
                if (m.cache_kind == FLOAT32)
                    attend_any(m.head_dim, q, static_cast<float*>(layer.keys) + at,
                               static_cast<float*>(layer.values) + at, length, group, scores, stride, out);
                else
                    attend_any(m.head_dim, q, static_cast<bf16*>(layer.keys) + at,
                               static_cast<bf16*>(layer.values) + at, length, group, scores, stride, out);
            });

            phases.run(phase++, pieces(layer.wo.blocks), nothing, [&](int piece) {
                for (int r = 0; r < rows; r++) line[r] = {mixed + r * mixed_width, x + r * width, 1};
                multiply(layer.wo, line, rows, piece, true);
            });

            if (layer.gate)
                phases.run(phase++, rows, nothing, [&](int r) {
                    rms_norm(x + r * width, layer.ffn_norm, normed, m.dim, m.eps);
                    choose_experts(m, layer.gate, normed, mixing + r * m.n_routed * 2);
                });

            // Routing: `members(e)` fills in the rows of expert e (-1: the part that every row passes) and where
            // in `hidden` their inner values stand: first those of that part, then one after another of a row's experts.
            const int shared = layer.shared.w1.blocks * LANES, wide = layer.gate ? layer.routed[0].w1.blocks * LANES : 0;
            const int total = shared + m.top_k * wide;
            int which[MAX_ROWS], n;
            float* inner[MAX_ROWS];  // (total,) for w1 and the result, then as much for w3
            auto members = [&](int e) {
                n = 0;
                for (int r = 0; r < rows; r++) {
                    const float* weights = mixing + r * m.n_routed * 2;
                    if (e >= 0 && weights[e] == 0) continue;
                    int place = 0;
                    for (int other = 0; other < e; other++) place += weights[other] > 0;
                    which[n] = r;
                    inner[n++] = hidden + size_t(r) * 2 * total + (e < 0 ? 0 : shared + place * wide);
                }
                return e < 0 ? layer.shared : layer.routed[e];
            };
            const int n_first = pieces(layer.shared.w1.blocks), n_each = pieces(wide / LANES);
            phases.run(phase++, n_first + n_each * (layer.gate ? m.n_routed : 0), [&] { norm_with(layer.ffn_norm); }, [&](int piece) {
                const int e = piece < n_first ? -1 : (piece - n_first) / n_each;
                const Experts& mlp = members(e);
                piece = piece < n_first ? piece : (piece - n_first) % n_each;
                for (int i = 0; i < n; i++) line[i] = {normed + which[i] * width, inner[i], 1};
                multiply(mlp.w1, line, n, piece, false);
                for (int i = 0; i < n; i++) line[i].out += total;
                multiply(mlp.w3, line, n, piece, false);
                const int from = piece * PIECE, to = std::min(from + PIECE, mlp.w1.blocks);
                for (int i = 0; i < n; i++) swiglu(inner[i], inner[i] + total, from * LANES, to * LANES);
            });

            phases.run(phase++, pieces(width / LANES), nothing, [&](int piece) {
                for (int e = -1; e < (layer.gate ? m.n_routed : 0); e++) {
                    const Experts& mlp = members(e);
                    if (mlp.w2.blocks == 0) continue;
                    for (int i = 0; i < n; i++)
                        line[i] = {inner[i], x + which[i] * width, e < 0 ? 1 : mixing[which[i] * m.n_routed * 2 + e]};
                    multiply(mlp.w2, line, n, piece, true);
                }
            });
        }
        const int out_width = m.output.blocks * LANES;
        auto norm_ends = [&] {
            for (int i = 0; i < n_ends; i++) rms_norm(x + ends[i] * width, m.norm, normed + i * width, m.dim, m.eps);
        };
        phases.run(phase++, pieces(m.output.blocks), norm_ends, [&](int piece) {
            for (int i = 0; i < n_ends; i++) line[i] = {normed + i * width, logits + size_t(i) * out_width, 1};
            multiply(m.output, line, n_ends, piece, false);
        });
    }
}
