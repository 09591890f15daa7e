// Whole texts through a dense MiniMind on a CPU, and the logits after some of their tokens.
//
// A matrix unit (AMX) multiplies bfloat16 about twenty times as fast as the vector unit does float32, so fast that a
// framework which runs one operator at a time is busy with everything else: copies, norms, rotations, softmax. Here
// operands are laid out in the unit's tiles by whatever computes them, and results are used while they are in the nearest
// cache. One call is one thread; several threads read several batches.
//
// Numbers: an operand is rounded to bfloat16 (8 significant bits), or to the sum of two of them (16 bits: hi and lo), of
// which the product is hi hi + hi lo + lo hi. Sums, the residual stream, norms and the softmax are float32.
//
// Without AMX the same tiles are multiplied by AVX512-BF16 or plain vectors. prefill.py lays out the weights and calls this.

#include "kernel.hpp"

#include <cstdlib>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int PAIR = 2 * LANES;       // a tile of a left operand is 16 rows of 32; of a right one 16 columns of 32,
constexpr int TILE = LANES * PAIR;    // as [16 pairs of inputs][16 columns][2]
constexpr int MAX_HEAD = 8 * LANES;

}  // namespace

// ---- structs that Python fills in. Matrices (outputs, inputs) are tiles [parts][outputs / 16][inputs / 32][16][16][2], with the
// norm's weight before them folded in and outputs filled up to a multiple of 32.

struct Layer {
    const bf16 *qkv;  // the queries' part divided by sqrt(head_dim), or q_norm
    const bf16 *wo;
    const bf16 *w13;  // 16 outputs of w1, 16 of w3, ...
    const bf16 *w2;
    const float *q_norm, *k_norm;  // (head_dim,), or null
};

struct Model {
    const float* embedding;    // (vocab, dim)
    const float *cos, *sin;    // (positions, head_dim): of every feature, the sines of even ones negative
    const Layer* layers;
    const bf16* output;
    int32_t dim, n_layers, n_heads, n_kv_heads, head_dim, hidden, vocab;  // the last two filled up to a multiple of 32
    float eps;
};

namespace {

int up(int n, int to = PAIR) { return (n + to - 1) / to * to; }

// ---- the product of tiles

// Rows of tiles of an operand: those of one row follow each other; the next row is `next`, the low parts of all numbers
// are `low` further on.
struct Tiles {
    const bf16* at;
    size_t next, low;
    Tiles operator+(int tiles) const { return {at + size_t(tiles) * TILE, next, low}; }
};

// multiply<P, M, N>: c (16 M, 16 N), rows `width` apart, = or += a b, of M and N rows of `depth` tiles in P parts. `ahead`:
// what a later product reads as its `b`; two 64-byte lines of each of its tiles are fetched meanwhile.

#if defined(__AMX_BF16__)

// Left operands pass by once, and should not push out of the nearest cache the right ones, which many rows use.
template <int M>
inline __attribute__((always_inline)) void load_left(const bf16* a, size_t next) {
    _tile_stream_loadd(4, a, 2 * PAIR);
    if constexpr (M == 2) _tile_stream_loadd(5, a + next, 2 * PAIR);
}
template <int N>
inline __attribute__((always_inline)) void load_right(const bf16* b, size_t next) {
    _tile_loadd(6, b, 2 * PAIR);
    if constexpr (N == 2) _tile_loadd(7, b + next, 2 * PAIR);
}
template <int M, int N>
inline __attribute__((always_inline)) void multiply_loaded() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (M == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (N == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (M == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
}

template <int P, int M, int N>
inline void multiply(Tiles a, Tiles b, int depth, float* c, int width, bool add, const bf16* ahead = nullptr) {
    const size_t down = size_t(LANES) * width, stride = width * sizeof(float);
    asm volatile("" ::: "memory");  // GCC's headers do not say that loading a tile reads memory
    if (add) {
        _tile_loadd(0, c, stride);
        if constexpr (N == 2) _tile_loadd(1, c + LANES, stride);
        if constexpr (M == 2) _tile_loadd(2, c + down, stride);
        if constexpr (M == 2 && N == 2) _tile_loadd(3, c + down + LANES, stride);
    } else {
        _tile_zero(0);
        if constexpr (N == 2) _tile_zero(1);
        if constexpr (M == 2) _tile_zero(2);
        if constexpr (M == 2 && N == 2) _tile_zero(3);
    }
    for (int k = 0; k < depth; k++, a.at += TILE, b.at += TILE) {
        load_left<M>(a.at, a.next);
        load_right<N>(b.at, b.next);
        if (ahead)
            for (const bf16* line : {ahead, ahead + PAIR, ahead + b.next, ahead + b.next + PAIR})
                _mm_prefetch(line + size_t(k) * TILE, _MM_HINT_T1);
        multiply_loaded<M, N>();
        if constexpr (P == 2) {
            load_right<N>(b.at + b.low, b.next);
            multiply_loaded<M, N>();
            load_left<M>(a.at + a.low, a.next);
            load_right<N>(b.at, b.next);
            multiply_loaded<M, N>();
        }
    }
    _tile_stored(0, c, stride);
    if constexpr (N == 2) _tile_stored(1, c + LANES, stride);
    if constexpr (M == 2) _tile_stored(2, c + down, stride);
    if constexpr (M == 2 && N == 2) _tile_stored(3, c + down + LANES, stride);
}

struct MatrixUnit {  // a thread's, while this lives
    MatrixUnit() {
        struct __attribute__((packed)) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes_per_row[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; i++) config.bytes_per_row[i] = 2 * PAIR, config.rows[i] = LANES;
        _tile_loadconfig(&config);
    }
    ~MatrixUnit() { _tile_release(); }
};

#else

inline void multiply_tile(const bf16* a, const bf16* b, floats* total) {
    for (int k = 0; k < LANES; k++) {
        const words pairs = *reinterpret_cast<const words*>(b + k * PAIR);
#if !defined(__AVX512BF16__)
        const floats even = (floats)(pairs << 16), odd = (floats)(pairs & 0xffff0000u);
#endif
        for (int r = 0; r < LANES; r++) {
#if defined(__AVX512BF16__)
            int32_t pair;
            std::memcpy(&pair, a + r * PAIR + 2 * k, 4);
            total[r] = (floats)_mm512_dpbf16_ps((__m512)total[r], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)pairs);
#else
            total[r] += even * widen(a[r * PAIR + 2 * k]) + odd * widen(a[r * PAIR + 2 * k + 1]);
#endif
        }
    }
}

template <int P, int M, int N>
inline void multiply(Tiles a, Tiles b, int depth, float* c, int width, bool add, const bf16* = nullptr) {
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            float* to = c + size_t(m) * LANES * width + n * LANES;
            floats total[LANES] = {};
            for (int r = 0; add && r < LANES; r++) total[r] = load(to + r * width);
            for (int k = 0; k < depth; k++) {
                const bf16 *left = a.at + m * a.next + k * TILE, *right = b.at + n * b.next + k * TILE;
                multiply_tile(left, right, total);
                if (P == 2) multiply_tile(left + a.low, right, total), multiply_tile(left, right + b.low, total);
            }
            for (int r = 0; r < LANES; r++) store(to + r * width, total[r]);
        }
}

struct MatrixUnit {};

#endif

// ---- parts

inline words rounded(floats v) {  // the bits of the nearest bfloat16, as those of a float
    const words bits = (words)v;
    return (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
}

inline void store(bf16* to, floats v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    *reinterpret_cast<halves*>(to) = __builtin_convertvector(rounded(v) >> 16, halves);
#endif
}

template <int P>
inline void split(bf16* to, size_t low, floats v) {
    store(to, v);
    if (P == 2) store(to + low, v - (floats)rounded(v));
}

template <int P>
inline void split(bf16* to, size_t low, floats a, floats b) {  // side by side
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
    store(to, a), store(to + LANES, b);
#endif
    if (P == 2) store(to + low, a - (floats)rounded(a)), store(to + low + LANES, b - (floats)rounded(b));
}

inline floats turn(floats v, const float* cos, const float* sin) {  // (a, b) -> (a cos - b sin, b cos + a sin)
#if defined(__AVX512F__)
    const floats other = (floats)_mm512_permute_ps((__m512)v, 0xb1);
#else
    floats other;
    for (int i = 0; i < LANES; i++) other[i] = v[i ^ 1];
#endif
    return v * load(cos) + other * load(sin);
}

// A matrix of floats in blocks of 32 by 32, which lie in one piece, as a product stores them; or plain rows.
struct Grid {
    float* at;
    size_t down, right;  // from a block to the next one; 0 to the right: there is one column of blocks, used for all
    int width;           // from a row to the next one
    static Grid blocks(float* at, int columns) { return {at, size_t(columns) * PAIR, PAIR * PAIR, PAIR}; }
    static Grid plain(float* at, int columns) { return {at, size_t(columns) * PAIR, PAIR, columns}; }
    float* operator()(int row, int column) const {
        return at + row / PAIR * down + column / PAIR * right + row % PAIR * width + column % PAIR;
    }
};

// A left operand of any number of rows: tiles [parts][rows / 16][columns / 32][16][32].
template <int P>
struct Operand {
    bf16* at;
    int rows, columns;
    size_t low() const { return size_t(rows) * columns; }
    Tiles tiles(int row) const { return {at + size_t(row) * columns, size_t(LANES) * columns, low()}; }
    bf16* operator()(int row, int column) const {
        const size_t tile = size_t(row / LANES) * (columns / PAIR) + column / PAIR;
        return at + tile * TILE + row % LANES * PAIR + column % PAIR;
    }
    void put(int row, int column, floats v) const { split<P>((*this)(row, column), low(), v); }
};

template <int P>
void rms_norm(const Grid& x, const Operand<P>& out, float eps) {
    for (int r = 0; r < out.rows; r++) {
        floats squares[2] = {};
        for (int i = 0; i < out.columns; i += PAIR) {
            const floats a = load(x(r, i)), b = load(x(r, i) + LANES);
            squares[0] += a * a, squares[1] += b * b;
        }
        const float factor = 1 / std::sqrt(sum(squares[0] + squares[1]) / out.columns + eps);
        for (int i = 0; i < out.columns; i += PAIR)
            split<P>(out(r, i), out.low(), load(x(r, i)) * factor, load(x(r, i) + LANES) * factor);
    }
}

// Scale `heads` heads of every row, from column `from` on, to a root mean square of 1 times `weight` (head_dim,).
void norm_heads(const Grid& x, int rows, int from, int heads, int head_dim, const float* weight, float eps) {
    for (int r = 0; r < rows; r++)
        for (int head = from; head < from + heads * head_dim; head += head_dim) {
            floats squares = {};
            for (int i = 0; i < head_dim; i += LANES) squares += load(x(r, head + i)) * load(x(r, head + i));
            const float factor = 1 / std::sqrt(sum(squares) / head_dim + eps);
            for (int i = 0; i < head_dim; i += LANES) store(x(r, head + i), load(x(r, head + i)) * factor * load(weight + i));
        }
}

// done(row, column) for every block of 32 by 32 of c (a.rows, columns) = or += a w, all multiples of 32; c(row, column) is
// where to put it, c.width apart.
template <int P, class Done>
void product(const Operand<P>& a, const bf16* w, int columns, const Grid& c, bool add, Done done) {
    constexpr int SLAB = 16 / P;  // tiles: those of 32 columns stay in the nearest cache, while all rows pass by
    const size_t inputs = a.columns;
    const int depth = a.columns / PAIR;
    for (int n = 0; n < columns; n += PAIR)
        for (int k = 0; k < depth; k += SLAB) {
            const Tiles right = Tiles{w + n * inputs, LANES * inputs, columns * inputs} + k;
            const bf16* following = k + SLAB < depth ? right.at + SLAB * TILE : w + (n + PAIR) * inputs;
            for (int r = 0; r < a.rows; r += PAIR) {
                multiply<P, 2, 2>(a.tiles(r) + k, right, std::min(SLAB, depth - k), c(r, n), c.width, add || k > 0,
                                  following + 2 * r % TILE);
                if (k + SLAB >= depth) done(r, n);
            }
        }
}

template <int P>
void product(const Operand<P>& a, const bf16* w, int columns, const Grid& c, bool add) {
    product(a, w, columns, c, add, [](int, int) {});
}

// out (rows, hidden) = silu(a w1) * (a w3); both (rows, 32) to work in
template <int P>
void swiglu(const Operand<P>& a, const bf16* w13, const Grid& both, const Operand<P>& out) {
    product(a, w13, 2 * out.columns, both, false, [&](int row, int column) {
        const float* block = both(row, column);
        for (int i = 0; i < PAIR; i++, block += both.width)
            out.put(row + i, column / 2, silu(load(block)) * load(block + LANES));
    });
}

// ---- attention

// Keys and values of one text and head, as right operands: keys [parts][length / 16][head / 32], with columns for keys;
// values [parts][head / 16 + 1][length / 32], with columns for features, and then columns of ones: their results
// are the sums of the weights. `length` is filled up to a multiple of 32, with zeros.
template <int P>
struct Cell {
    bf16* at;
    int length, head_dim;
    static size_t size(int length, int head_dim) { return size_t(P) * up(length) * (up(head_dim) + head_dim + LANES); }
    size_t keys_size() const { return size_t(length) * up(head_dim); }
    size_t values_size() const { return size_t(length) * (head_dim + LANES); }
    Tiles keys(int key) const { return {at + size_t(key) * up(head_dim), size_t(LANES) * up(head_dim), keys_size()}; }
    Tiles values(int feature) const {
        return {at + P * keys_size() + size_t(feature) * length, size_t(LANES) * length, values_size()};
    }
    void put_key(int t, int feature, floats v) const {
        bf16 parts[P][LANES];
        split<P>(parts[0], LANES, v);
        bf16* to = at + (size_t(t / LANES) * (up(head_dim) / PAIR) + feature / PAIR) * TILE;
        to += feature % PAIR / 2 * PAIR + t % LANES * 2;
        for (int p = 0; p < P; p++)
            for (int i = 0; i < LANES / 2; i++) std::memcpy(to + p * keys_size() + i * PAIR, &parts[p][2 * i], 4);
    }
    void put_values(int t, int feature, floats even, floats odd) const {  // of the keys t, which is even, and t + 1
        bf16* to = at + P * keys_size() + (size_t(feature / LANES) * (length / PAIR) + t / PAIR) * TILE + t % PAIR * LANES;
        for (int p = 0; p < P; p++) {
            const words a = rounded(even), b = rounded(odd);
            *reinterpret_cast<words*>(to + p * values_size()) = a >> 16 | b;
            even -= (floats)a, odd -= (floats)b;
        }
    }
};

struct Text { int start, length; size_t cell; };  // its first row; tokens; where the kv of its heads begin

// H query heads that share keys and values, from `head` on, in one text: out[row] = softmax(q keys) values, causal, after
// the `n_past` keys of `past`. No largest score is subtracted: where they leave the range of e^x, the result is NaN, never wrong.
// Only for rows of which one of 16 neighbours is in `wanted`. shares (parts, H, 16, past.length + own.length) to work in.
template <int P, int H>
void attend(const Model& m, const Text& text, const Cell<P>& own, const Cell<P>& past, int n_past, const Grid& qkv, int head,
            const char* wanted, bf16* shares, const Operand<P>& out) {
    const int D = m.head_dim, deep = up(D) / PAIR, all = past.length + own.length;
    alignas(64) bf16 q[P * H * MAX_HEAD * LANES] = {};
    alignas(64) float scores[H * LANES * PAIR], mixed[H * LANES * (MAX_HEAD + PAIR)];
    const size_t q_next = size_t(deep) * TILE, q_low = H * q_next;
    const size_t next = size_t(all) * LANES, low = H * next;
    ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int first = 0; first < text.length; first += LANES) {
        const int n = std::min(LANES, text.length - first);
        if (!std::count(wanted + text.start + first, wanted + text.start + first + n, 1)) continue;
        for (int h = 0; h < H; h++)
            for (int r = 0; r < n; r++) {
                const size_t position = size_t(n_past + first + r) * D;
                for (int i = 0; i < D; i += LANES) {
                    const floats v = load(qkv(text.start + first + r, (head + h) * D + i));
                    split<P>(q + h * q_next + i / PAIR * TILE + r * PAIR + i % PAIR, q_low,
                             turn(v, m.cos + position + i, m.sin + position + i));
                }
            }
        const int seen = past.length + up(first + n);
        for (int k = 0; k < seen; k += PAIR) {
            const bool before = k < past.length;
            multiply<P, H, 2>({q, q_next, q_low}, before ? past.keys(k) : own.keys(k - past.length), deep, scores, PAIR, false);
            bf16* share = shares + size_t(k) * LANES;
            const bool seen_by_all = before ? k + PAIR <= n_past : k + PAIR <= past.length + first + 1;
            for (int i = 0; i < H * TILE; i += PAIR) {
                floats a = exp(load(scores + i)), b = exp(load(scores + i + LANES));
                if (!seen_by_all) {
                    const int end = before ? n_past : past.length + first + i % TILE / PAIR + 1;
                    a = lane < end - k ? a : floats{}, b = lane < end - k - LANES ? b : floats{};
                }
                split<P>(share + i / TILE * next + i % TILE, low, a, b);
            }
        }
        const Tiles weights{shares, next, low}, own_weights = weights + past.length / PAIR;
        const int width = up(D + LANES);
        for (int i = 0; i < D + LANES; i += PAIR) {
            auto mix = [&](auto product) {
                if (past.length) product(weights, past.values(i), past.length / PAIR, false);
                product(own_weights, own.values(i), (seen - past.length) / PAIR, past.length > 0);
            };
            if (i + PAIR <= D + LANES)
                mix([&](Tiles a, Tiles b, int depth, bool add) { multiply<P, H, 2>(a, b, depth, mixed + i, width, add); });
            else mix([&](Tiles a, Tiles b, int depth, bool add) { multiply<P, H, 1>(a, b, depth, mixed + i, width, add); });
        }
        for (int h = 0; h < H; h++)
            for (int r = 0; r < n; r++) {
                const float* from = mixed + (h * LANES + r) * width;
                const float whole = from[D] > 1e-30f ? 1 / from[D] : NAN;  // if all weights are tiny, some have become 0
                for (int i = 0; i < D; i += LANES)
                    out.put(text.start + first + r, (head + h) * D + i, load(from + i) * whole);
            }
    }
}

// ---- memory to work in: a thread's own, and kept by it

class Memory {
public:
    ~Memory() { std::free(at); }
    template <class T>
    T* take(size_t n) {
        constexpr size_t page = 1 << 21;  // with pages of 4 KB, half of the time is spent on address translation
        const size_t bytes = (n * sizeof(T) + page - 1) / page * page;
        if (bytes > size) {
            std::free(at);
            at = std::aligned_alloc(page, bytes);
            size = at ? bytes : 0;
            if (!at) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
            madvise(at, bytes, MADV_HUGEPAGE);
#endif
        }
        return static_cast<T*>(at);
    }
private:
    void* at = nullptr;
    size_t size = 0;
};

template <int P>
void read_texts(const Model& m, int n_texts, const int64_t* lengths, const int64_t* tokens, int n_past, const bf16* past,
                bf16* kept, int n_positions, const int64_t* positions, float* logits) {
    const MatrixUnit unit;
    const int D = m.head_dim, width = (m.n_heads + 2 * m.n_kv_heads) * D, attended_width = m.n_heads * D;
    const int group = m.n_heads / m.n_kv_heads;
    thread_local Memory x_memory, in_memory, qkv_memory, both_memory, hidden_memory, kv_memory,
        shares_memory, chosen_memory, chosen_x_memory;
    std::vector<Text> texts(n_texts);
    int n = 0, longest = 0;
    size_t n_kv = 0;
    for (int i = 0; i < n_texts; i++) {
        texts[i] = {n, int(lengths[i]), n_kv};
        n += int(lengths[i]);
        n_kv += Cell<P>::size(int(lengths[i]), D) * m.n_kv_heads;
        longest = std::max(longest, int(lengths[i]));
    }
    int rows = up(n);
    const size_t most = std::max(rows, up(n_positions));
    Grid x = Grid::blocks(x_memory.take<float>(most * m.dim), m.dim);
    const Grid qkv = Grid::blocks(qkv_memory.take<float>(most * width), width);
    bf16* in_at = in_memory.take<bf16>(P * most * std::max(m.dim, attended_width));
    float* both = both_memory.take<float>(most * PAIR);
    bf16* hidden = hidden_memory.take<bf16>(P * most * m.hidden);
    bf16* kv = kept ? kept : kv_memory.take<bf16>(n_kv);
    bf16* shares = shares_memory.take<bf16>(size_t(2) * P * (up(n_past) + up(longest)) * LANES);
    const size_t past_size = Cell<P>::size(n_past, D);
    std::vector<char> wanted(n, 1);

    for (int r = 0; r < rows; r++)
        for (int i = 0; i < m.dim; i += LANES)
            store(x(r, i), r < n ? load(m.embedding + tokens[r] * m.dim + i) : floats{});
    for (int l = 0; l < m.n_layers; l++) {
        const Layer& layer = m.layers[l];
        const bool last = l == m.n_layers - 1;  // its outputs at other tokens than `positions` are not needed
        if (last) {
            std::fill(wanted.begin(), wanted.end(), 0);
            for (int i = 0; i < n_positions; i++) wanted[positions[i]] = 1;
        }
        Operand<P> in{in_at, rows, m.dim}, attended{in_at, rows, attended_width};
        rms_norm(x, in, m.eps);
        product(in, layer.qkv, width, qkv, false);
        if (layer.q_norm) {
            norm_heads(qkv, n, 0, m.n_heads, D, layer.q_norm, m.eps);
            norm_heads(qkv, n, attended_width, m.n_kv_heads, D, layer.k_norm, m.eps);
        }

        std::memset(kv, 0, n_kv * sizeof(bf16));
        for (int i = 0; i < n_texts; i++)
            for (int h = 0; h < m.n_kv_heads; h++) {
                const Text& text = texts[i];
                const Cell<P> own{kv + text.cell + h * Cell<P>::size(text.length, D), up(text.length), D};
                const Cell<P> before{const_cast<bf16*>(past) + (size_t(l) * m.n_kv_heads + h) * past_size, up(n_past), D};
                const int keys = attended_width + h * D, values = keys + m.n_kv_heads * D;
                for (int t = 0; t < text.length; t++) {
                    const size_t position = size_t(n_past + t) * D;
                    const int row = text.start + t;
                    for (int f = 0; f < D; f += LANES)
                        own.put_key(t, f, turn(load(qkv(row, keys + f)), m.cos + position + f, m.sin + position + f));
                    if (t % 2) continue;
                    const bool two = t + 1 < text.length;
                    for (int f = 0; f < D; f += LANES)
                        own.put_values(t, f, load(qkv(row, values + f)), two ? load(qkv(row + 1, values + f)) : floats{});
                    own.put_values(t, D, floats{} + 1.0f, floats{} + float(two));
                }
                int head = h * group;
                for (; head + 2 <= (h + 1) * group; head += 2)
                    attend<P, 2>(m, text, own, before, n_past, qkv, head, wanted.data(), shares, attended);
                for (; head < (h + 1) * group; head++)
                    attend<P, 1>(m, text, own, before, n_past, qkv, head, wanted.data(), shares, attended);
            }
        if (kept) kv += n_kv;
        if (last) {
            if (n_positions == 0) return;
            rows = up(n_positions);
            const Operand<P> chosen{chosen_memory.take<bf16>(size_t(P) * rows * attended_width), rows, attended_width};
            const Grid chosen_x = Grid::blocks(chosen_x_memory.take<float>(size_t(rows) * m.dim), m.dim);
            for (int i = 0; i < rows; i++) {
                const int position = int(positions[std::min(i, n_positions - 1)]);
                for (int c = 0; c < m.dim; c += LANES) store(chosen_x(i, c), load(x(position, c)));
                for (int p = 0; p < P; p++)
                    for (int c = 0; c < attended_width; c += PAIR)
                        std::memcpy(chosen(i, c) + p * chosen.low(), attended(position, c) + p * attended.low(), PAIR * sizeof(bf16));
            }
            x = chosen_x, attended = chosen, in.rows = rows;
        }
        product(attended, layer.wo, m.dim, x, true);
        rms_norm(x, in, m.eps);
        const Operand<P> inner{hidden, rows, m.hidden};
        swiglu(in, layer.w13, Grid{both, PAIR * PAIR, 0, PAIR}, inner);
        product(inner, layer.w2, m.dim, x, true);
    }
    const Operand<P> in{in_at, rows, m.dim};
    rms_norm(x, in, m.eps);
    product(in, m.output, m.vocab, Grid::plain(logits, m.vocab), false);
}

}  // namespace

// Return the unit that computes the products: "AMX", "AVX512-BF16" or "vectors"; null if the system does not let this process use AMX.
extern "C" const char* matrix_unit() {
#if defined(__AMX_BF16__)
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0 ? "AMX" : nullptr;
#elif defined(__AVX512BF16__)
    return "AVX512-BF16";
#else
    return "vectors";
#endif
}

// Return how many bfloat16 numbers the keys and values of one layer take for one text.
extern "C" size_t kv_size(const Model* m, int parts, int length) {
    return (parts == 2 ? Cell<2>::size(length, m->head_dim) : Cell<1>::size(length, m->head_dim)) * m->n_kv_heads;
}

// `n_texts` texts of `lengths` tokens, one after another in `tokens`, all of which continue the same `n_past` tokens
// (`past`: what `kept` was when those were read; null with none). `positions` (n_positions,): indices of tokens -> `logits`
// (n_positions filled up to a multiple of 32, vocab). With `kept`, n_layers * kv_size of one text, keys and values are stored there.
extern "C" int prefill(const Model* m, int parts, int n_texts, const int64_t* lengths, const int64_t* tokens, int n_past,
                       const bf16* past, bf16* kept, int n_positions, const int64_t* positions, float* logits) {
    try {
        (parts == 2 ? read_texts<2> : read_texts<1>)(*m, n_texts, lengths, tokens, n_past, past, kept, n_positions, positions, logits);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
