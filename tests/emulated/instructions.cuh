// native/instructions.cuh for a CPU: every thread of the GPU is a fiber. Which of them runs next is drawn at random, and
// so is when copies arrive. Shared memory begins as NaN. A launch in which nobody gets on ends with an error.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
using std::max;
using std::min;

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) ulonglong2 { u64 x, y; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
struct Dim { u32 x; };

namespace emulated {
struct Barrier {  // of threads
    int arrived = 0;
    u32 round = 0;
};
struct Warp {
    Barrier barrier;
    u32 round = 0, values[2][32][6];
};
struct Copy { void* to; const void* from; };
struct Group { std::vector<Copy> copies; std::vector<u64*> barriers; };
struct Fiber {
    ucontext_t first;  // where it begins; from then on it goes on where it stopped
    jmp_buf here;
    bool begun = false;
    std::vector<char> stack;
    int block, thread;
    u32 collected = 0;  // times that the warp exchanged values
    bool done = false;
    Group open;
    std::deque<Group> on_their_way;
};
struct Block {
    std::vector<unsigned char> shared;
    std::vector<Warp> warps;
    Barrier all, first;
};
inline std::vector<Fiber> fibers;
inline std::vector<Block> blocks;
inline Fiber* now;
inline jmp_buf scheduler;
inline std::mt19937 draw;
inline u64 idle = 0;  // turns since somebody told something, had a copy, or ended
inline int threads = 0;

inline Block& block() { return blocks[now->block]; }
inline void wait_turn() {
    idle++;
    if (!_setjmp(now->here)) _longjmp(scheduler, 1);
}
inline void got_on() { idle = 0; }
inline void wait_for(Barrier& barrier, int count) {
    const u32 round = barrier.round;
    if (++barrier.arrived == count) barrier.arrived = 0, barrier.round++;
    else while (barrier.round == round) wait_turn();
}
// All lanes' values; the others may be two exchanges ahead at most of who still reads.
template <int COUNT>
inline u32 (*exchange(const u32 (&values)[COUNT]))[6] {
    Warp& warp = block().warps[now->thread / 32];
    u32 (*all)[6] = warp.values[now->collected++ % 2];
    memcpy(all[now->thread % 32], values, sizeof values);
    wait_for(warp.barrier, 32);
    return all;
}
template <class T>
inline T of_lane(T value, u32 lane) {
    u32 bits[1];
    memcpy(bits, &value, 4);
    T found;
    memcpy(&found, exchange(bits)[lane % 32], 4);
    return found;
}
// A barrier of shared memory: its phase, and how many are to arrive, of how many.
inline void arrive(u64& barrier) {
    u64 phase = barrier >> 32 & 1, expected = barrier >> 16 & 0xffff, pending = (barrier & 0xffff) - 1;
    if (!pending) phase ^= 1, pending = expected;
    barrier = phase << 32 | expected << 16 | pending;
}
inline void land(Fiber& fiber) {
    Group group = std::move(fiber.on_their_way.front());
    fiber.on_their_way.pop_front();
    for (const Copy& copy : group.copies) memcpy(copy.to, copy.from, 16);
    for (u64* barrier : group.barriers) arrive(*barrier);
    got_on();
}
inline void begin(std::function<void()>* body) {
    (*body)();
    now->done = true;
    got_on();
    _longjmp(scheduler, 1);
}
// Whether all threads came to their end.
inline bool launch(int grid, int block_threads, size_t shared_bytes, u32 seed, std::function<void()> body) {
    draw.seed(seed);
    idle = 0, threads = block_threads;
    blocks = std::vector<Block>(grid);
    fibers = std::vector<Fiber>(grid * block_threads);
    for (Block& each : blocks) each.shared.assign(shared_bytes + 128, 0xff), each.warps.resize(block_threads / 32);
    for (size_t i = 0; i < fibers.size(); i++) {
        Fiber& fiber = fibers[i];
        fiber.block = i / block_threads, fiber.thread = i % block_threads;
        fiber.stack.resize(96 * 1024);
        getcontext(&fiber.first);
        fiber.first.uc_stack.ss_sp = fiber.stack.data();
        fiber.first.uc_stack.ss_size = fiber.stack.size();
        fiber.first.uc_link = nullptr;
        makecontext(&fiber.first, (void (*)())begin, 1, &body);
    }
    std::vector<Fiber*> live;
    for (Fiber& fiber : fibers) live.push_back(&fiber);
    while (!live.empty() && idle < 2000 * fibers.size()) {
        const volatile size_t i = draw() % live.size();
        // A warp that gets its turn has several lanes that can go on.
        for (volatile size_t j = 0; j < 32; j = j + 1) {
            now = live[(i + j) % live.size()];
            if (!now->on_their_way.empty() && draw() % 8 == 0) land(*now);
            if (now->done || _setjmp(scheduler)) continue;
            if (std::exchange(now->begun, true)) _longjmp(now->here, 1);
            setcontext(&now->first);
        }
        std::erase_if(live, [](Fiber* each) { return each->done; });
    }
    return live.empty();
}
}  // namespace emulated

#define threadIdx (Dim{(u32)emulated::now->thread})
#define blockIdx (Dim{(u32)emulated::now->block})
#define gridDim (Dim{(u32)emulated::blocks.size()})

inline float __uint_as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
inline u32 __float_as_uint(float x) { u32 y; memcpy(&y, &x, 4); return y; }
inline float __expf(float x) { return std::exp(x); }
template <class T> inline T __ldg(const T* at) { return *at; }
template <class T> inline T __shfl_xor_sync(u32, T value, int other) { return emulated::of_lane(value, emulated::now->thread % 32 ^ other); }
template <class T> inline T __shfl_sync(u32, T value, int lane) { return emulated::of_lane(value, lane); }
template <class T> inline T __shfl_down_sync(u32, T value, int by) {
    const u32 lane = emulated::now->thread % 32;
    return emulated::of_lane(value, lane + by < 32 ? lane + by : lane);
}
inline u32 __ballot_sync(u32, bool is) {
    const u32 values[6] = {is};
    const u32 (*all)[6] = emulated::exchange(values);
    u32 lanes = 0;
    for (int lane = 0; lane < 32; lane++) lanes |= all[lane][0] << lane;
    return lanes;
}
inline int __clz(u32 x) { return x ? __builtin_clz(x) : 32; }
inline void __syncwarp() { emulated::wait_for(emulated::block().warps[emulated::now->thread / 32].barrier, 32); }
inline void __syncthreads() { emulated::wait_for(emulated::block().all, emulated::threads); }
inline u32 atomicAdd(u32* at, u32 value) { return std::exchange(*at, *at + value); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline float low(u32 pair) { return __uint_as_float(pair << 16); }
inline float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
inline float wide(bf16 x) { return __uint_as_float((u32)x << 16); }
inline bf16 narrow(float x) {
    const u32 bits = __float_as_uint(x);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 narrow(float first, float second) { return (u32)narrow(second) << 16 | narrow(first); }
inline float power(float x) { return std::exp2(x); }
inline void mma(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 values[6] = {a0, a1, a2, a3, b0, b1}, lane = emulated::now->thread % 32;
    const u32 (*all)[6] = emulated::exchange(values);
    for (int i = 0; i < 4; i++)
        for (u32 k = 0; k < 4; k++) {
            const u32 *a = all[lane / 4 * 4 + k] + i / 2, *b = all[(lane % 4 * 2 + i % 2) * 4 + k] + 4;
            sums[i] += low(a[0]) * low(b[0]) + high(a[0]) * high(b[0]) + low(a[2]) * low(b[1]) + high(a[2]) * high(b[1]);
        }
}
template <int COUNT> inline void sync_first() { emulated::wait_for(emulated::block().first, COUNT); }
inline void init(u64& barrier, u32 count) { barrier = (u64)count << 16 | count; }
inline void arrive(u64& barrier) { emulated::arrive(barrier), emulated::got_on(); }
inline void wait(u64& barrier, u32 parity) {
    while ((barrier >> 32 & 1) == parity) emulated::wait_turn();
}

inline u64 read_once() { return 0; }
inline void copy_16(void* to, const void* from, int bytes, u64) {
    static const u32 zeros[4] = {};
    memset(to, 0xff, 16);  // until the copy arrives
    emulated::now->open.copies.push_back({to, bytes ? from : zeros});
}
inline void arrive_copied(u64& barrier) { emulated::now->open.barriers.push_back(&barrier); }
template <int UNDER_WAY> inline void wait_copied() {
    auto& groups = emulated::now->on_their_way;
    groups.push_back(std::exchange(emulated::now->open, {}));
    while (groups.size() > UNDER_WAY) emulated::land(*emulated::now);
    emulated::wait_turn();
}

inline void tell_word(u64* at, u64 word) { *at = word, emulated::got_on(); }
inline void tell(u64* at, u32 data, u32 mark) { tell_word(at, (u64)mark << 32 | data); }
inline u64 look(const u64* at) {
    emulated::wait_turn();
    return *at;
}
inline ulonglong2 look_twice(const u64* at) { return {look(at), look(at + 1)}; }

inline unsigned char* dynamic_shared() {
    return (unsigned char*)(((uintptr_t)emulated::block().shared.data() + 127) / 128 * 128);
}
template <int COUNT> inline void fewer_registers() {}
template <int COUNT> inline void more_registers() {}
