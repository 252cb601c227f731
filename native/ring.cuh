// What the parts of decode_step.cu share: sizes, and the ring of weights in shared memory.
#include "instructions.cuh"

struct Layer {  // _Layer in persistent_step.py
    const bf16 *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias, *gate_up, *gate_up_bias, *down, *down_bias, *norm, *mlp_norm;
    bf16 *k, *v;                                             // [slots, rows, KV_HEADS, HEAD_DIM]
    long long k_slot, k_row, k_head, v_slot, v_row, v_head;  // strides, in elements
    long long window;                                        // rows that a query sees
};

struct Step {  // _step_type in persistent_step.py
    Layer layers[LAYERS];
    const bf16 *norm, *output;    // [HIDDEN], [VOCAB, HIDDEN]
    const float* angles;          // [rows, 2, HEAD_DIM / 2], cosines and sines
    const int *slots, *rows;      // [batch]: of each token
    const bf16* embedded;         // [batch, HIDDEN]
    bf16* logits;                 // [batch, VOCAB]
    u64 *stream, *qkv;            // marked words: [batch, HIDDEN / 2] pairs, [batch, QKV] sums
    u64 *partials;                // [units, GROUP, HEAD_DIM + 2] sums
    u64 *attended, *activated;    // [batch, HEADS * HEAD_DIM / 2], [batch, INTER / 2] pairs
    u32* counters;                // marks used so far; multiprocessors that have left
    float eps, scale;
    int batch, splits;            // splits: multiprocessors that share a token and KV head
};

constexpr int QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM, ATTENDED = HEADS * HEAD_DIM, GROUP = HEADS / KV_HEADS;
constexpr int CONSUMERS = 8, THREADS = 32 * CONSUMERS, PRODUCERS = 4;  // warps, threads of consumers, warps
constexpr int TILE = 16, CHUNK = 512;  // a stage of the ring: TILE rows of CHUNK weights
constexpr int PAD = 64;                // bytes behind a row; so that eight lanes' reads are in different banks
constexpr int PITCH = CHUNK * 2 + PAD, STAGE = TILE * PITCH;
// Stages still on their way when the next one is asked for. As many as the ring holds would keep the memory as busy, but
// words between multiprocessors take longer then, and some multiprocessors get a fifth less of the memory than others.
// Microseconds of a step at batch 1 with 1 and 2: 758 and 804 of a Llama-3.2-1B, 4,105 and 4,134 of a Llama-3.1-8B (probe,
// H200, 2026-11-28).
constexpr int UNDER_WAY = 1;
constexpr float NEVER = -1e30f;  // below every score

// ---- marked words: what multiprocessors tell one another ----
// A word is 32 bits of data and a mark, which no other write of the word has (in 2^32 phases, some hours of steps). It is
// written and read as one, so a reader that sees the mark has the data: no fence, no counter, no second look (as NCCL's
// protocol for low latency has it).
__device__ __forceinline__ bool marked(u64 word, u32 mark) { return (u32)(word >> 32) == mark; }
__device__ __forceinline__ bool marked(ulonglong2 words, u32 mark) { return marked(words.x, mark) && marked(words.y, mark); }
__device__ __forceinline__ void look_at(u64& word, const u64* at) { word = look(at); }
__device__ __forceinline__ void look_at(ulonglong2& words, const u64* at) { words = look_twice(at); }
__device__ __forceinline__ u32 heard(u64 word, const u64* at, u32 mark) {
    while (!marked(word, mark)) word = look(at);
    return (u32)word;
}
// All words that a warp needs: ``at(i)`` of each lane, where it ``has(i)``. A look takes about a microsecond, so all are
// under way together. If words are not there yet, one lane waits for one of them; then all look again. Looks of all lanes,
// again and again, would slow the weights down.
template <class Word, int COUNT, class At, class Has>
__device__ __forceinline__ void hear(Word (&words)[COUNT], u32 mark, At at, Has has) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (has(i)) look_at(words[i], at(i));
    for (;;) {
        int early = -1;
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (has(i) && !marked(words[i], mark)) early = i;
        const u32 lanes = __ballot_sync(~0u, early >= 0);
        if (lanes == 0) return;
        if (threadIdx.x % 32 == 31 - __clz(lanes)) {
            Word word;
            do look_at(word, at(early));
            while (!marked(word, mark));
#pragma unroll
            for (int i = 0; i < COUNT; i++)
                if (i == early) words[i] = word;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (has(i) && !marked(words[i], mark)) look_at(words[i], at(i));
    }
}

// ---- who computes what ----
// The tiles of all products are dealt to the multiprocessors in one round, so that none gets more than one tile more.
struct Deal {
    u32 offset = 0;
    __device__ __forceinline__ u32 first(u32 tiles) {
        const u32 tile = (blockIdx.x + gridDim.x - offset) % gridDim.x;
        offset = (offset + tiles) % gridDim.x;
        return tile;
    }
};
__host__ __device__ constexpr u32 tiles_of(int rows) { return (rows + TILE - 1) / TILE; }
constexpr u32 PAIR_TILES = (INTER + TILE / 2 - 1) / (TILE / 2);  // half a tile of gates, and the other halves

// ---- the producers ----
// A row of every stage of the ring that this multiprocessor will use, in order.
struct Cursor {
    const Step& step;
    u32 row;  // of a tile
    int layer = 0, matrix = -1, k = 0, inner = 0;
    u32 tile = 0, tiles = 0;
    const bf16* from = nullptr;
    bool done = false;
    Deal deal{};

    __device__ void open() {  // the next matrix of which there are tiles for this multiprocessor
        do {
            if (++matrix == 4) matrix = 0, layer++;
            const bool last = layer == LAYERS;
            if (last && matrix == 1) {
                done = true;
                return;
            }
            inner = last || matrix == 0 || matrix == 2 ? HIDDEN : matrix == 1 ? ATTENDED : INTER;
            tiles = last ? tiles_of(VOCAB) : matrix == 0 ? tiles_of(QKV) : matrix == 2 ? PAIR_TILES : tiles_of(HIDDEN);
            tile = deal.first(tiles);
        } while (tile >= tiles);
        seek();
    }
    __device__ void seek() {
        const bool last = layer == LAYERS;
        const Layer& at = step.layers[last ? 0 : layer];
        const bf16* weight = last ? step.output : matrix == 0 ? at.qkv : matrix == 1 ? at.o : matrix == 2 ? at.gate_up : at.down;
        int which;  // row of the matrix; past its end the last one again, whose products nobody takes
        if (!last && matrix == 2) {
            which = min((int)(tile * (TILE / 2) + row % (TILE / 2)), INTER - 1) + (row < TILE / 2 ? 0 : INTER);
        } else {
            which = min((int)(tile * TILE + row), (last ? VOCAB : matrix == 0 ? QKV : HIDDEN) - 1);
        }
        from = weight + (long long)which * inner;
    }
    __device__ __forceinline__ void next() {
        k += CHUNK;
        if (k < inner) return;
        k = 0;
        tile += gridDim.x;
        if (tile < tiles) seek();
        else open();
    }
};

__device__ void produce(const Step& step, unsigned char* ring, u64* full, u64* empty, u32 thread) {
    constexpr int LANES = 32 * PRODUCERS / TILE, PIECES = CHUNK / 8 / LANES;  // that copy a row; of 16 bytes, for each
    constexpr bool WHOLE = HIDDEN % CHUNK == 0 && ATTENDED % CHUNK == 0 && INTER % CHUNK == 0;
    const u32 row = thread / LANES, lane = thread % LANES;
    unsigned char* to = ring + row * PITCH + lane * 16;
    const u64 policy = read_once();
    u32 stage = 0, parity = 1;
    Cursor cursor{step, row};
    for (cursor.open(); !cursor.done; cursor.next()) {
        wait(empty[stage], parity);
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int k = cursor.k + (i * LANES + lane) * 8;
            const bool there = WHOLE || k < cursor.inner;
            copy_16(to + stage * STAGE + i * LANES * 16, cursor.from + (there ? k : 0), there ? 16 : 0, policy);
        }
        arrive_copied(full[stage]);
        wait_copied<UNDER_WAY>();
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    wait_copied<0>();
}
