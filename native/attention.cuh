// Attention of one new token of each sequence; part of Consumer in decode_step.cu.
//
// A unit is a token, a KV head and a part of the cached rows. A warp takes 8 or 16 rows at a time: scores by matrix
// instructions, an online softmax (Milakov & Gimelshein, arXiv 1805.02867), and every lane a few dimensions of the result.
// The row of the new token is in no part: it comes from this layer's product, and the last part counts it.

    struct Unit {
        int token, head, split, row, low, high;  // cached rows [low, high); row: the new token's
        bf16 *k, *v;                             // row 0 of this head
    };
    int first_row = 0;  // of the first unit, which is the same in every layer; and its slot
    long long first_slot = 0;
    int angles_row = -1;  // whose angles these are
    float cosines[PAIRS], sines[PAIRS];

    __device__ void load_angles(int row) {
        if (row == angles_row) return;
        angles_row = row;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const float* angle = step.angles + (long long)row * HEAD_DIM + lane + 32 * i;
            cosines[i] = __ldg(angle), sines[i] = __ldg(angle + HALF);
        }
    }
    __device__ void find_first() {
        const int token = (int)blockIdx.x / step.splits / KV_HEADS;
        if (token >= step.batch) return;
        first_row = step.rows[token], first_slot = step.slots[token];
        load_angles(first_row);
    }
    __device__ Unit unit_at(const Layer& layer, int index) {
        Unit unit;
        unit.split = index % step.splits;
        unit.head = index / step.splits % KV_HEADS;
        unit.token = index / step.splits / KV_HEADS;
        const bool first = index == (int)blockIdx.x;
        unit.row = first ? first_row : step.rows[unit.token];
        const long long slot = first ? first_slot : step.slots[unit.token];
        const int start = layer.window > unit.row ? 0 : unit.row + 1 - (int)layer.window;
        const int part = (unit.row - start + step.splits - 1) / step.splits;
        unit.low = min(start + unit.split * part, unit.row);
        unit.high = min(unit.low + part, unit.row);
        unit.k = layer.k + slot * layer.k_slot + unit.head * layer.k_head;
        unit.v = layer.v + slot * layer.v_slot + unit.head * layer.v_head;
        return unit;
    }

    // A head of the new token, normed and turned: queries, then K, then V, in shared memory; K and V in the cache too.
    __device__ void take_head(const Layer& layer, const Unit& unit, int item, bf16* heads) {
        const bool is_k = item == GROUP, is_v = item == GROUP + 1;
        const int head = is_v ? HEADS + KV_HEADS + unit.head : is_k ? HEADS + unit.head : unit.head * GROUP + item;
        const u64* from = step.qkv + unit.token * QKV + head * HEAD_DIM + lane;
        const bf16* norm = is_v ? nullptr : is_k ? layer.k_norm : layer.q_norm;
        float one[PAIRS], two[PAIRS], square = 0.0f;
        u64 words[PAIRS * 2];
        hear(words, mark + QKV_TOLD, [&](int i) { return from + i % 2 * HALF + i / 2 * 32; }, [](int) { return true; });
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            one[i] = __uint_as_float((u32)words[2 * i]), two[i] = __uint_as_float((u32)words[2 * i + 1]);
            square += one[i] * one[i] + two[i] * two[i];
        }
        if (norm) {
#pragma unroll
            for (int other = 16; other; other >>= 1) square += __shfl_xor_sync(~0u, square, other);
            const float scale = rsqrtf(square / HEAD_DIM + step.eps);
#pragma unroll
            for (int i = 0; i < PAIRS; i++)
                one[i] *= scale * wide(norm[lane + 32 * i]), two[i] *= scale * wide(norm[HALF + lane + 32 * i]);
        }
        bf16* to = heads + item * HEAD_DIM + lane;
        bf16* cached = (is_v ? unit.v + unit.row * layer.v_row : unit.k + unit.row * layer.k_row) + lane;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            if (!is_v) {
                const float turned = one[i] * cosines[i] - two[i] * sines[i];
                two[i] = two[i] * cosines[i] + one[i] * sines[i];
                one[i] = turned;
            }
            to[32 * i] = narrow(one[i]), to[HALF + 32 * i] = narrow(two[i]);
            if (is_k || is_v) cached[32 * i] = narrow(one[i]), cached[HALF + 32 * i] = narrow(two[i]);
        }
    }

    template <int ROWS>  // 8 or 16 at a time
    __device__ void take_rows(const Layer& layer, const Unit& unit, bf16* heads, float* result) {
        constexpr int BLOCKS = HEAD_DIM / 32;
        uint4 q[BLOCKS], k[BLOCKS][2];
        u32 v[ROWS][LANE_DIMS / 2];
        float most[2] = {NEVER, NEVER}, total[2] = {0.0f, 0.0f}, out[GROUP][LANE_DIMS] = {};
        auto load_k = [&](int row) {
            const bf16* one = unit.k + min(row + (int)group, unit.high - 1) * layer.k_row + quarter * 8;
            const bf16* two = unit.k + min(row + (int)group + 8, unit.high - 1) * layer.k_row + quarter * 8;
#pragma unroll
            for (int i = 0; i < BLOCKS; i++) {
                k[i][0] = __ldg((const uint4*)(one + i * 32));
                k[i][1] = make_uint4(0, 0, 0, 0);
                if (ROWS == 16) k[i][1] = __ldg((const uint4*)(two + i * 32));
            }
        };
        auto load_v = [&](int row) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const bf16* at = unit.v + min(row + r, unit.high - 1) * layer.v_row + lane * LANE_DIMS;
                if (LANE_DIMS == 4) {
                    const uint2 pair = __ldg((const uint2*)at);
                    v[r][0] = pair.x, v[r][LANE_DIMS / 2 - 1] = pair.y;
                } else {
                    v[r][0] = __ldg((const u32*)at);
                }
            }
        };
        int row = unit.low + warp * ROWS;
        if (row < unit.high) load_k(row), load_v(row);  // under way while this layer's product is waited for
        for (int item = warp; item < GROUP + (unit.split == step.splits - 1 ? 2 : 0); item += CONSUMERS)
            take_head(layer, unit, item, heads);
        sync_first<THREADS>();
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            q[i] = make_uint4(0, 0, 0, 0);
            if (group < GROUP) q[i] = *(const uint4*)(heads + group * HEAD_DIM + i * 32 + quarter * 8);
        }
        while (row < unit.high) {
            const int next = row + CONSUMERS * ROWS;
            float score[4] = {};
#pragma unroll
            for (int i = 0; i < BLOCKS; i++) {
                mma(score, k[i][0].x, k[i][1].x, k[i][0].y, k[i][1].y, q[i].x, q[i].y);
                mma(score, k[i][0].z, k[i][1].z, k[i][0].w, k[i][1].w, q[i].z, q[i].w);
            }
            if (next < unit.high) load_k(next);
            float (*probabilities)[8] = small.probabilities[warp];
            __syncwarp();  // the last rows' are read
#pragma unroll
            for (int h = 0; h < 2; h++) {  // the lane's two heads
                const float one = row + (int)group < unit.high ? score[h] * step.scale : NEVER;
                const float two = ROWS == 16 && row + (int)group + 8 < unit.high ? score[2 + h] * step.scale : NEVER;
                float now = fmaxf(one, two);
#pragma unroll
                for (int other = 4; other < 32; other <<= 1) now = fmaxf(now, __shfl_xor_sync(~0u, now, other));
                now = fmaxf(now, most[h]);
                const float rescale = power(most[h] - now), p = power(one - now), p2 = ROWS == 16 ? power(two - now) : 0.0f;
                most[h] = now;
                total[h] = total[h] * rescale + p + p2;
                probabilities[group][quarter * 2 + h] = p;
                if (ROWS == 16) probabilities[group + 8][quarter * 2 + h] = p2;
                if (group == 0) small.rescale[warp][quarter * 2 + h] = rescale;
            }
            __syncwarp();
#pragma unroll
            for (int h = 0; h < GROUP; h++)
#pragma unroll
                for (int d = 0; d < LANE_DIMS; d++) out[h][d] *= small.rescale[warp][h];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float p[8];
                *(float4*)p = *(const float4*)probabilities[r];
                if (GROUP > 4) *(float4*)(p + 4) = *(const float4*)(probabilities[r] + 4);
#pragma unroll
                for (int d = 0; d < LANE_DIMS / 2; d++)
#pragma unroll
                    for (int h = 0; h < GROUP; h++) {
                        out[h][2 * d] += p[h] * low(v[r][d]);
                        out[h][2 * d + 1] += p[h] * high(v[r][d]);
                    }
            }
            if (next < unit.high) load_v(next);
            row = next;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int other = 4; other < 32; other <<= 1) total[h] += __shfl_xor_sync(~0u, total[h], other);
            if (group == 0) small.most[warp][quarter * 2 + h] = most[h], small.total[warp][quarter * 2 + h] = total[h];
        }
#pragma unroll
        for (int h = 0; h < GROUP; h++)
#pragma unroll
            for (int d = 0; d < LANE_DIMS; d++) result[(warp * GROUP + h) * HEAD_DIM + lane * LANE_DIMS + d] = out[h][d];
    }

    __device__ void attend(const Layer& layer) {
        bf16* heads = (bf16*)x;  // in the room for activations: queries, K, V of the token, then what the warps found
        float* result = (float*)(heads + (GROUP + 2) * HEAD_DIM);
        for (int index = blockIdx.x; index < step.batch * KV_HEADS * step.splits; index += gridDim.x) {
            const Unit unit = unit_at(layer, index);
            const bool has_new = unit.split == step.splits - 1;
            load_angles(unit.row);
            sync_first<THREADS>();  // the last unit's, or activations, are read
            if (unit.high - unit.low <= 8 * CONSUMERS) take_rows<8>(layer, unit, heads, result);
            else take_rows<16>(layer, unit, heads, result);
            if (warp < GROUP) {  // the new row, as one more part
                float score = 0.0f;
                const bf16 *query = heads + warp * HEAD_DIM, *key = heads + GROUP * HEAD_DIM;
                if (has_new)
                    for (int d = lane; d < HEAD_DIM; d += 32) score += wide(query[d]) * wide(key[d]);
#pragma unroll
                for (int other = 16; other; other >>= 1) score += __shfl_xor_sync(~0u, score, other);
                if (lane == 0) {
                    small.most[CONSUMERS][warp] = has_new ? score * step.scale : NEVER;
                    small.total[CONSUMERS][warp] = has_new ? 1.0f : 0.0f;
                }
            }
            sync_first<THREADS>();
            u64* attended = step.attended + (unit.token * ATTENDED + unit.head * GROUP * HEAD_DIM) / 2;
            u64* partial = step.partials + (long long)index * WORDS;
            for (int i = thread * 2; i < GROUP * HEAD_DIM; i += THREADS * 2) {
                const int head = i / HEAD_DIM, d = i % HEAD_DIM;
                float most = NEVER, total = 0.0f;
                float2 sum = make_float2(0, 0);
#pragma unroll
                for (int w = 0; w <= CONSUMERS; w++) most = fmaxf(most, small.most[w][head]);
#pragma unroll
                for (int w = 0; w <= CONSUMERS; w++) {
                    if (small.total[w][head] == 0.0f) continue;
                    const float weight = power(small.most[w][head] - most);
                    total += weight * small.total[w][head];
                    float2 part;
                    if (w < CONSUMERS) part = *(const float2*)(result + (w * GROUP + head) * HEAD_DIM + d);
                    else part = make_float2(wide(heads[(GROUP + 1) * HEAD_DIM + d]), wide(heads[(GROUP + 1) * HEAD_DIM + d + 1]));
                    sum.x += weight * part.x, sum.y += weight * part.y;
                }
                if (step.splits == 1) {
                    tell(attended + i / 2, narrow(sum.x / total, sum.y / total), mark + ATTENDED_TOLD);
                    continue;
                }
                tell(partial + i, __float_as_uint(sum.x), mark + PARTS_TOLD);
                tell(partial + i + 1, __float_as_uint(sum.y), mark + PARTS_TOLD);
                if (d == 0) {
                    tell(partial + GROUP * HEAD_DIM + head, __float_as_uint(most), mark + PARTS_TOLD);
                    tell(partial + GROUP * (HEAD_DIM + 1) + head, __float_as_uint(total), mark + PARTS_TOLD);
                }
            }
            // Those who share a token and head share the rest: 32 outputs a warp. Then each has one unit.
            if (step.splits > 1)
                for (int block = unit.split + warp * step.splits; block < GROUP * HEAD_DIM / 32; block += CONSUMERS * step.splits)
                    combine(partial - unit.split * WORDS, attended, block * 32 + lane);
        }
    }

    // One output of a token and KV head, from what all splits found. A lane hears the weight of a split.
    __device__ void combine(const u64* parts, u64* attended, int i) {
        constexpr int MANY = 16;
        const int head = i / HEAD_DIM;
        float most = NEVER, total = 0.0f, sum = 0.0f;
        u64 words[MANY + 2];  // of so many splits; what the lane's split has as most and in all
        const auto hear_from = [&](int first) {
            hear(
                words, mark + PARTS_TOLD,
                [&](int s) {
                    return s < MANY ? parts + (first + s) * WORDS + i
                                    : parts + lane * WORDS + GROUP * (HEAD_DIM + s - MANY) + head;
                },
                [&](int s) { return s < MANY ? first + s < step.splits : first == 0 && (int)lane < step.splits; });
        };
        hear_from(0);
        if ((int)lane < step.splits) most = __uint_as_float((u32)words[MANY]), total = __uint_as_float((u32)words[MANY + 1]);
        float highest = most;
#pragma unroll
        for (int other = 16; other; other >>= 1) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, other));
        const float weight = total == 0.0f ? 0.0f : power(most - highest);
        total *= weight;
#pragma unroll
        for (int other = 16; other; other >>= 1) total += __shfl_xor_sync(~0u, total, other);
        for (int first = 0; first < step.splits; first += MANY) {
            if (first) hear_from(first);
#pragma unroll
            for (int s = 0; s < MANY; s++) {
                const float its = __shfl_sync(~0u, weight, first + s);
                if (first + s >= step.splits) continue;
                sum += its * __uint_as_float((u32)words[s]);
            }
        }
        const float result = sum / total, neighbour = __shfl_down_sync(~0u, result, 1);
        if (lane % 2 == 0) tell(attended + i / 2, narrow(result, neighbour), mark + ATTENDED_TOLD);
    }
