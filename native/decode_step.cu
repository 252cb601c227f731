// A whole decode step, from the tokens' embeddings to the logits, as one kernel.
//
// A step of few tokens takes as long as reading the weights does. Kernels that follow one another each begin with an
// empty memory pipeline and end by emptying it. Here four warps of every multiprocessor (the producers) do nothing but
// copy the weights that the multiprocessor will need, in the order in which it will need them, into a ring in shared
// memory. They never wait for results. Eight other warps (the consumers) multiply. What multiprocessors tell one another
// between the phases of a layer goes through marked words in L2; the ring fills meanwhile.
//
// Compiled at run time (vattn/ops/persistent_step.py) with the shape of one model:
//   HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTER, VOCAB, LAYERS: of the model.
//   TOKENS: the most tokens of a step, up to 8. STAGES: of the ring, at least 8. X_BYTES: of shared memory for activations.
// Sums are of float32 and in a fixed order: the same inputs give the same bits.
//
// Why no word is written again before all have read it: each phase hears every word that the phase before it told, and
// tells only then. So whoever tells a word of the next layer knows that all have told what they made of the last one.
#include "ring.cuh"

constexpr int SUM_PITCH = 20;  // floats from token to token; so that a warp's writes do not collide
constexpr int SUMS = CONSUMERS * 8 * SUM_PITCH;
constexpr int LANE_DIMS = HEAD_DIM / 32;                                       // of V and the result, that a lane holds
constexpr int HALF = HEAD_DIM / 2, PAIRS = HALF / 32;                          // pairs that a lane turns
constexpr int WORDS = GROUP * (HEAD_DIM + 2);                                  // that a unit of attention tells
enum Phase { QKV_TOLD = 1, PARTS_TOLD, ATTENDED_TOLD, ADDED_TOLD, ACTIVATED_TOLD, LAYER_TOLD, PHASES = LAYER_TOLD };

struct Small {
    u64 full[STAGES], empty[STAGES];
    float squares[CONSUMERS][TOKENS];
    float probabilities[CONSUMERS][16][8];
    float rescale[CONSUMERS][8];
    float most[CONSUMERS + 1][8], total[CONSUMERS + 1][8];
};

static_assert(STAGES >= CONSUMERS, "a warp that takes every eighth stage would be a round ahead of the ring");
static_assert(sizeof(Small) <= 6 * 1024, "more than persistent_step.py leaves for it");

struct Consumer {
    const Step& step;
    unsigned char *ring, *x;
    float* sums;
    Small& small;
    u32 thread, warp, lane, group, quarter;  // group, quarter: of eight, of four, as the matrix instruction has it
    u32 mark = 0;                            // before this layer's
    u32 at = 0, buffer = 0;                  // at: stages of the ring so far
    Deal deal{};

    // ---- activations into shared memory ----
    static constexpr int PIECES = (HIDDEN / 8 + THREADS - 1) / THREADS;  // of eight activations, that a thread norms
    __device__ void load_weight(uint4 (&weight)[PIECES], const bf16* from) {
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            if ((i * THREADS + thread) * 8 < HIDDEN) weight[i] = __ldg((const uint4*)from + i * THREADS + thread);
    }

    // x <- the norm of the residual stream, rounded once.
    static constexpr int AT_ONCE = TOKENS * PIECES <= 8 ? TOKENS : PIECES < 8 ? 8 / PIECES : 1;
    __device__ void load_normed(const uint4 (&weight)[PIECES], bool first_layer, u32 mark) {
        constexpr int pitch = HIDDEN * 2 + PAD;
        sync_first<THREADS>();
        for (int start = 0; start < step.batch; start += AT_ONCE) {
            ulonglong2 words[AT_ONCE * PIECES * 2];
            const auto in_row = [&](int i) { return i / 2 % PIECES * THREADS + (int)thread; };  // pieces of a token
            const auto token = [&](int i) { return start + i / (2 * PIECES); };
            if (!first_layer)
                hear(
                    words, mark, [&](int i) { return step.stream + (token(i) * (HIDDEN / 8) + in_row(i)) * 4 + i % 2 * 2; },
                    [&](int i) { return in_row(i) * 8 < HIDDEN && token(i) < step.batch; });
#pragma unroll
            for (int t = 0; t < AT_ONCE; t++) {
                if (start + t >= step.batch) break;
                float square = 0.0f;
#pragma unroll
                for (int i = 0; i < PIECES; i++) {
                    if ((i * THREADS + thread) * 8 >= HIDDEN) continue;
                    const int piece = (start + t) * (HIDDEN / 8) + i * THREADS + thread;
                    uint4 value;
                    if (first_layer) {
                        value = ((const uint4*)step.embedded)[piece];
                    } else {
                        const ulonglong2 one = words[(t * PIECES + i) * 2], two = words[(t * PIECES + i) * 2 + 1];
                        value = make_uint4((u32)one.x, (u32)one.y, (u32)two.x, (u32)two.y);
                    }
                    const u32 pairs[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
                    for (int j = 0; j < 4; j++) square += low(pairs[j]) * low(pairs[j]) + high(pairs[j]) * high(pairs[j]);
                    *(uint4*)(x + (start + t) * pitch + (i * THREADS + thread) * 16) = value;
                }
#pragma unroll
                for (int other = 16; other; other >>= 1) square += __shfl_xor_sync(~0u, square, other);
                if (lane == 0) small.squares[warp][start + t] = square;
            }
        }
        sync_first<THREADS>();
        for (int t = 0; t < step.batch; t++) {
            float square = 0.0f;
#pragma unroll
            for (int w = 0; w < CONSUMERS; w++) square += small.squares[w][t];
            const float scale = rsqrtf(square / HIDDEN + step.eps);
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                if ((i * THREADS + thread) * 8 >= HIDDEN) continue;
                uint4& value = *(uint4*)(x + t * pitch + (i * THREADS + thread) * 16);
                const u32 v[4] = {value.x, value.y, value.z, value.w};
                const u32 w[4] = {weight[i].x, weight[i].y, weight[i].z, weight[i].w};
                u32 result[4];
#pragma unroll
                for (int j = 0; j < 4; j++) result[j] = narrow(low(v[j]) * scale * low(w[j]), high(v[j]) * scale * high(w[j]));
                value = make_uint4(result[0], result[1], result[2], result[3]);
            }
        }
        sync_first<THREADS>();
    }
    // x <- activations that other multiprocessors tell.
    template <int INNER>
    __device__ void load(const u64* from, u32 mark) {
        constexpr int ROW = INNER / 4, OWN = (TOKENS * ROW + THREADS - 1) / THREADS;  // pieces of four, of a token, a thread
        constexpr int MANY = OWN < 16 ? OWN : 16;                                     // under way
        sync_first<THREADS>();
        for (int first = thread; first - (int)thread < step.batch * ROW; first += MANY * THREADS) {
            ulonglong2 words[MANY];
            const auto has = [&](int i) { return first + i * THREADS < step.batch * ROW; };
            hear(words, mark, [&](int i) { return from + (first + i * THREADS) * 2; }, has);
#pragma unroll
            for (int i = 0; i < MANY; i++) {
                const int piece = first + i * THREADS;
                if (!has(i)) break;
                *(uint2*)(x + piece / ROW * (INNER * 2 + PAD) + piece % ROW * 8) = make_uint2((u32)words[i].x, (u32)words[i].y);
            }
        }
        sync_first<THREADS>();
    }

    // ---- products ----
    // One matrix with all tokens; a warp takes every eighth stage of the ring. ``finish(row, token, sums, others, prior)``
    // gets two outputs at ``row`` of a tile of this multiprocessor, of PAIRED matrices those of both halves, and what
    // ``prior(row, token)`` gave before.
    template <int INNER, bool PAIRED, class Prior, class Finish>
    __device__ void product(u32 tile, u32 tiles, Prior prior, Finish finish) {
        constexpr int ROUNDS = (INNER + CHUNK - 1) / CHUNK, BLOCKS = CHUNK / 32, HEIGHT = PAIRED ? TILE / 2 : TILE;
        constexpr int SETS = 4;  // of sums, as a matrix instruction waits for the one before
        const int token = thread / 8, in_tile = thread % 8 * 2;
        const bool mine = token < step.batch && in_tile < HEIGHT, has_token = group < step.batch;
        const unsigned char* activations = x + group * (INNER * 2 + PAD) + quarter * 16;
        for (; tile < tiles; tile += gridDim.x) {
            const int row = tile * HEIGHT + in_tile;
            const u64 before = mine ? prior(row, token) : 0;
            float acc[SETS][4] = {};
            const u32 first = (warp - at) % CONSUMERS;
            for (u32 round = first; round < ROUNDS; round += CONSUMERS) {
                const u32 stage = (at + round) % STAGES;
                wait(small.full[stage], (at + round) / STAGES & 1);
                const unsigned char* a = ring + stage * STAGE + group * PITCH + quarter * 16;
#pragma unroll
                for (int i = 0; i < BLOCKS; i++) {
                    const int k = round * CHUNK + i * 32;
                    if (INNER % CHUNK && k >= INNER) break;
                    const uint4 a0 = *(const uint4*)(a + i * 64), a1 = *(const uint4*)(a + i * 64 + 8 * PITCH);
                    const uint4 b = has_token ? *(const uint4*)(activations + k * 2) : make_uint4(0, 0, 0, 0);
                    mma(acc[i % SETS], a0.x, a1.x, a0.y, a1.y, b.x, b.y);
                    mma(acc[i % SETS], a0.z, a1.z, a0.w, a1.w, b.z, b.w);
                }
                __syncwarp();
                if (lane == 0) arrive(small.empty[stage]);
            }
            float* out = sums + buffer * SUMS;
            buffer ^= 1;  // who still reads the other one's last tile has not come to the next barrier
            if (first < ROUNDS)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    out[(warp * 8 + quarter * 2 + (i & 1)) * SUM_PITCH + group + (i >> 1) * 8] =
                        acc[0][i] + acc[1][i] + acc[2][i] + acc[3][i];
            sync_first<THREADS>();
            if (mine) {
                float2 sum = make_float2(0, 0), other = make_float2(0, 0);
#pragma unroll
                for (u32 w = 0; w < CONSUMERS; w++) {
                    if (ROUNDS < CONSUMERS && (w - at) % CONSUMERS >= ROUNDS) continue;
                    const float2 part = *(const float2*)(out + (w * 8 + token) * SUM_PITCH + in_tile);
                    sum.x += part.x, sum.y += part.y;
                    if (!PAIRED) continue;
                    const float2 half = *(const float2*)(out + (w * 8 + token) * SUM_PITCH + in_tile + TILE / 2);
                    other.x += half.x, other.y += half.y;
                }
                finish(row, token, sum, other, before);
            }
            at += ROUNDS;
        }
    }
    static __device__ __forceinline__ void add(float2& sum, const bf16* bias, int row) {
        if (bias) sum.x += wide(bias[row]), sum.y += wide(bias[row + 1]);
    }

    // A product on the residual stream, which is marked ``from`` and then ``to``.
    template <int INNER>
    __device__ void add_product(u32 tile, u32 tiles, const bf16* bias, bool first_layer, u32 from, u32 to) {
        product<INNER, false>(
            tile, tiles,
            [&](int row, int token) {
                const int pair = (token * HIDDEN + row) / 2;
                return row >= HIDDEN ? 0 : first_layer ? (u64)((const u32*)step.embedded)[pair] : look(step.stream + pair);
            },
            [&](int row, int token, float2 sum, float2, u64 word) {
                if (row >= HIDDEN) return;
                u64* at = step.stream + (token * HIDDEN + row) / 2;
                const u32 before = first_layer ? (u32)word : heard(word, at, from);
                add(sum, bias, row);
                tell(at, narrow(low(before) + sum.x, high(before) + sum.y), to);
            });
    }

#include "attention.cuh"

    // ---- the step ----
    __device__ void run() {
        const auto nothing = [](int, int) { return (u64)0; };
        uint4 weight[PIECES];
        mark = *(volatile u32*)step.counters;
        load_weight(weight, step.layers[0].norm);
        find_first();
        for (int i = 0; i < LAYERS; i++, mark += PHASES) {
            const Layer& layer = step.layers[i];
            u32 tiles = tiles_of(QKV), tile = deal.first(tiles);
            if (tile < tiles) {
                load_normed(weight, i == 0, mark);
                product<HIDDEN, false>(tile, tiles, nothing, [&](int row, int token, float2 sum, float2, u64) {
                    if (row >= QKV) return;
                    add(sum, layer.qkv_bias, row);
                    tell(step.qkv + token * QKV + row, __float_as_uint(sum.x), mark + QKV_TOLD);
                    tell(step.qkv + token * QKV + row + 1, __float_as_uint(sum.y), mark + QKV_TOLD);
                });
            }
            load_weight(weight, layer.mlp_norm);
            attend(layer);
            tiles = tiles_of(HIDDEN), tile = deal.first(tiles);
            if (tile < tiles) {
                load<ATTENDED>(step.attended, mark + ATTENDED_TOLD);
                add_product<ATTENDED>(tile, tiles, layer.o_bias, i == 0, mark, mark + ADDED_TOLD);
            }
            tiles = PAIR_TILES, tile = deal.first(tiles);
            if (tile < tiles) {
                load_normed(weight, false, mark + ADDED_TOLD);
                product<HIDDEN, true>(tile, tiles, nothing, [&](int row, int token, float2 gate, float2 up, u64) {
                    if (row >= INTER) return;
                    add(gate, layer.gate_up_bias, row);
                    add(up, layer.gate_up_bias, INTER + row);
                    const float one = gate.x / (1.0f + __expf(-gate.x)) * up.x, two = gate.y / (1.0f + __expf(-gate.y)) * up.y;
                    tell(step.activated + (token * INTER + row) / 2, narrow(one, two), mark + ACTIVATED_TOLD);
                });
            }
            load_weight(weight, i + 1 < LAYERS ? step.layers[i + 1].norm : step.norm);
            tiles = tiles_of(HIDDEN), tile = deal.first(tiles);
            if (tile < tiles) {
                load<INTER>(step.activated, mark + ACTIVATED_TOLD);
                add_product<INTER>(tile, tiles, layer.down_bias, false, mark + ADDED_TOLD, mark + LAYER_TOLD);
            }
        }
        const u32 tiles = tiles_of(VOCAB), tile = deal.first(tiles);
        if (tile < tiles) {
            load_normed(weight, false, mark);
            product<HIDDEN, false>(tile, tiles, nothing, [&](int row, int token, float2 sum, float2, u64) {
                if (row < VOCAB) step.logits[(long long)token * VOCAB + row] = narrow(sum.x);
                if (row + 1 < VOCAB) step.logits[(long long)token * VOCAB + row + 1] = narrow(sum.y);
            });
        }
        sync_first<THREADS>();
        if (thread == 0 && atomicAdd(step.counters + 1, 1) == gridDim.x - 1) {  // the last to leave: all have read both
            step.counters[0] = mark;
            step.counters[1] = 0;
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32 * PRODUCERS, 1) decode_step(const __grid_constant__ Step step) {
    unsigned char* shared = dynamic_shared();
    unsigned char* x = shared + STAGES * STAGE;
    float* sums = (float*)(x + X_BYTES);
    Small& small = *(Small*)(sums + 2 * SUMS);
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES; i++) init(small.full[i], 32 * PRODUCERS), init(small.empty[i], 1);
    __syncthreads();
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= CONSUMERS) {  // who copies needs few registers
        fewer_registers<56>();
        produce(step, shared, small.full, small.empty, threadIdx.x - THREADS);
    } else {
        more_registers<224>();
        Consumer{step, shared, x, sums, small, threadIdx.x, warp, lane, lane / 4, lane % 4}.run();
    }
}
