// What decode_step.cu needs of the GPU beyond CUDA C++: its instructions, one a function. tests/emulated has the same for
// a CPU.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

// ---- instructions ----
__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float wide(bf16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ u32 narrow(float first, float second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
__device__ __forceinline__ bf16 narrow(float x) { return (bf16)narrow(x, 0.0f); }
__device__ __forceinline__ float power(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ void mma(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The first COUNT threads of the block.
template <int COUNT>
__device__ __forceinline__ void sync_first() {
    asm volatile("bar.sync 1, %0;" ::"n"(COUNT) : "memory");
}
__device__ __forceinline__ void init(u64& barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void wait(u64& barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(
            shared_address(&barrier)),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void arrive(u64& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// ---- copies into shared memory, 16 bytes each, under way while the thread goes on ----
__device__ __forceinline__ u64 read_once() {  // lines of L2 that hold what is copied are the first to go
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// ``bytes`` of them are copied, the rest is zero. (A copy that a predicate leaves out does not do: ptxas 13.0 makes an
// instruction of it that no GPU has.)
__device__ __forceinline__ void copy_16(void* to, const void* from, int bytes, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(to)), "l"(from), "r"(bytes), "l"(policy)
                 : "memory");
}
__device__ __forceinline__ void arrive_copied(u64& barrier) {  // when this thread's copies so far are there
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
template <int UNDER_WAY>
__device__ __forceinline__ void wait_copied() {  // until so many of the thread's calls of this have copies under way
    asm volatile("cp.async.commit_group; cp.async.wait_group %0;" ::"n"(UNDER_WAY) : "memory");
}

// ---- words of 64 bits in global memory, which other multiprocessors see whole ----
__device__ __forceinline__ void tell(u64* at, u32 data, u32 mark) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(at), "l"((u64)mark << 32 | data) : "memory");
}
__device__ __forceinline__ u64 look(const u64* at) {
    u64 word;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(at) : "memory");
    return word;
}
__device__ __forceinline__ ulonglong2 look_twice(const u64* at) {
    ulonglong2 words;
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(words.x), "=l"(words.y) : "l"(at) : "memory");
    return words;
}

// ---- the block ----
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char shared[];
    return shared;
}
template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
