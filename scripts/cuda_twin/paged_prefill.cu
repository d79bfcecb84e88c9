// The prefill form of cuda_kernels/paged_attention_mma.py in CUDA C++, to hold numba's main loop against nvcc's.
//
// The same algorithm step by step: 64 rows of one KV head, tiles of 64 keys in two cp.async stages with rows padded to
// an odd number of 16-byte chunks, query fragments in registers, online softmax in base 2, partials of 256 keys merged in
// ascending order, tiles that every row sees whole left unmasked. 16-bit caches; no softcap, no sinks. Additions are
// fused where the source says so, and nowhere else (-fmad=false).
//
// Compiled for -DHEAD_DIM=64, 80, 96 or 128 and, with -DBF16, bfloat16.

#include <cstdint>

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif

namespace {

constexpr int D = HEAD_DIM, ROWS = 64, KEYS = 64, THREADS = 128, SPLIT_KEYS = 256;
constexpr int STEPS = D / 16, CHUNKS = D / 8, PITCH = (CHUNKS | 1) * 4, ROW_WORDS = CHUNKS * 4;
constexpr int TILE_WORDS = KEYS * PITCH, STAGE_WORDS = 2 * TILE_WORDS, STATE = 2 * STAGE_WORDS;
constexpr int SHIFT = 6, TILES_PER_SPLIT = SPLIT_KEYS / KEYS;
constexpr int SCORES = KEYS / 2, OUTPUTS = D / 2, PROBS = KEYS / 4;
constexpr unsigned FULL = 0xffffffffu;

__device__ __forceinline__ float neg_inf() { return __int_as_float(0xff800000); }

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t y;
#ifdef BF16
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(y) : "f"(low), "f"(high));
#else
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(y) : "f"(low), "f"(high));
#endif
    return y;
}

__device__ __forceinline__ void add_product(float *c, const uint32_t *a, uint32_t b0, uint32_t b1) {
#ifdef BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void ldmatrix(uint32_t *b, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_trans(uint32_t *b, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void copy16(uint32_t to, const uint32_t *from, int nbytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(nbytes) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x = x + __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}

__device__ __forceinline__ int lowest_key(int position, int window) {
    return position - window < 0 ? 0 : position - window + 1;
}

__device__ __forceinline__ void load_tile(uint32_t shared, int at, const uint32_t *k, const uint32_t *v,
                                          const int *table, int head, int num_kv_heads, int block_shift, int first_key,
                                          int low, int high, int thread) {
    const int block_mask = (1 << block_shift) - 1;
    const int block_words = (num_kv_heads << block_shift) * ROW_WORDS;
#pragma unroll
    for (int i = 0; i < KEYS * CHUNKS / THREADS; ++i) {
        const unsigned piece = thread + i * THREADS;
        const int chunk = THREADS % CHUNKS == 0 ? unsigned(thread) % CHUNKS : piece % CHUNKS;
        const int row = THREADS % CHUNKS == 0 ? unsigned(thread) / CHUNKS + i * (THREADS / CHUNKS) : piece / CHUNKS;
        const int key = first_key + row;
        const int seen = min(max(key, low), high);
        const int block = table[seen >> block_shift];
        const int offset = ((head << block_shift) + (seen & block_mask)) * ROW_WORDS + chunk * 4;
        const int nbytes = seen == key ? 16 : 0;
        const int64_t source = int64_t(block) * block_words + offset;
        const uint32_t to = shared + 4 * (at + row * PITCH + chunk * 4);
        copy16(to, k + source, nbytes);
        copy16(to + 4 * TILE_WORDS, v + source, nbytes);
    }
}

__device__ __forceinline__ void merge_row(float &top, float &total, float m, float l, int r, const float *o,
                                          float *merged) {
    if (l != 0.0f) {
        const float both = fmaxf(top, m);
        const float weight = exp2_approx(top - both), other_weight = exp2_approx(m - both);
        top = both;
        total = __fmaf_rn(l, other_weight, total * weight);
#pragma unroll
        for (int n = 0; n < OUTPUTS / 4; ++n) {
            const int i = n * 4 + r * 2;
            merged[i] = __fmaf_rn(o[i], other_weight, merged[i] * weight);
            merged[i + 1] = __fmaf_rn(o[i + 1], other_weight, merged[i + 1] * weight);
        }
    }
}

__device__ __forceinline__ void write_rows(float *out, int to_a, int to_b, int t, const float *x) {
#pragma unroll
    for (int n = 0; n < OUTPUTS / 4; ++n) {
        const int column = n * 8 + t * 2;
        if (to_a >= 0) *reinterpret_cast<float2 *>(out + int64_t(to_a) * D + column) = make_float2(x[n * 4], x[n * 4 + 1]);
        if (to_b >= 0)
            *reinterpret_cast<float2 *>(out + int64_t(to_b) * D + column) = make_float2(x[n * 4 + 2], x[n * 4 + 3]);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
    paged_prefill(const float *q, const uint32_t *k, const uint32_t *v, const int *cu_seqlens_q, const int *seq_lens,
                  const int *block_tables, float *out, float *lse, int q_stride, int q_head_stride, int table_stride,
                  int block_shift, int group_size, int num_kv_heads, int window, int query_limit, float query_scale) {
    extern __shared__ __align__(16) uint32_t sh[];
    const uint32_t shared = uint32_t(__cvta_generic_to_shared(sh));
    const int thread = threadIdx.x, lane = thread & 31, row_warp = thread >> 5, t = lane & 3;

    const int s = blockIdx.z, head = blockIdx.y, first_row = (gridDim.x - 1 - blockIdx.x) * ROWS;
    const int first_token = cu_seqlens_q[s], count = cu_seqlens_q[s + 1] - first_token, num_rows = count * group_size;
    if (first_row >= num_rows || count <= query_limit) return;
    const int context = seq_lens[s] - count;
    const int first_position = context + first_row / group_size;
    const int last_position = context + (min(first_row + ROWS, num_rows) - 1) / group_size;
    const int low = lowest_key(max(first_position, 0), window), low_last = lowest_key(max(last_position, 0), window);

    const int row_a = first_row + row_warp * 16 + (lane >> 2), row_b = row_a + 8;
    const int num_heads = num_kv_heads * group_size, last_row = num_rows - 1;
    const int query_a = min(row_a, last_row) / group_size, query_b = min(row_b, last_row) / group_size;
    const int from_a = (first_token + query_a) * num_heads + (head - query_a) * group_size + min(row_a, last_row);
    const int from_b = (first_token + query_b) * num_heads + (head - query_b) * group_size + min(row_b, last_row);
    const int high_a = row_a > last_row ? -1 : context + query_a, high_b = row_b > last_row ? -1 : context + query_b;
    uint4 *state = reinterpret_cast<uint4 *>(sh + STATE + thread * 4);
    float4 *merged_state = reinterpret_cast<float4 *>(sh + STATE + 8 * THREADS + thread * 4);
    state[0] = make_uint4(lowest_key(max(high_a, 0), window), high_a, lowest_key(max(high_b, 0), window), high_b);
    state[THREADS] = make_uint4(row_a > last_row ? -1 : from_a, row_b > last_row ? -1 : from_b, from_a, from_b);
    *merged_state = make_float4(neg_inf(), neg_inf(), 0.0f, 0.0f);

    float own[SCORES], o[OUTPUTS], merged[OUTPUTS], running[4] = {neg_inf(), neg_inf(), 0.0f, 0.0f};
    uint32_t kept[STEPS][4], probs[PROBS], b[4];
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) o[i] = merged[i] = 0.0f;

    const int *table = block_tables + int64_t(s) * table_stride;
    int tile = low >> SHIFT;
    const int end_tile = last_position >> SHIFT;
    if (tile <= end_tile)
        load_tile(shared, (tile & 1) * STAGE_WORDS, k, v, table, head, num_kv_heads, block_shift, tile << SHIFT, low,
                  last_position, thread);
    copies_commit();
    const float *q_a = q + int64_t(from_a / num_heads) * q_stride + int64_t(from_a % num_heads) * q_head_stride;
    const float *q_b = q + int64_t(from_b / num_heads) * q_stride + int64_t(from_b % num_heads) * q_head_stride;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int column = step * 16 + half * 8 + t * 2;
            const float2 x = *reinterpret_cast<const float2 *>(q_a + column);
            const float2 y = *reinterpret_cast<const float2 *>(q_b + column);
            kept[step][2 * half] = pack(x.x * query_scale, x.y * query_scale);
            kept[step][2 * half + 1] = pack(y.x * query_scale, y.y * query_scale);
        }
    }

    while (tile <= end_tile) {
        const int at = (tile & 1) * STAGE_WORDS, first_key = tile << SHIFT;
        copies_wait();
        __syncthreads();
        if (tile < end_tile)
            load_tile(shared, STAGE_WORDS - at, k, v, table, head, num_kv_heads, block_shift, first_key + KEYS, low,
                      last_position, thread);
        copies_commit();

        // S = Q K^T
#pragma unroll
        for (int i = 0; i < SCORES; ++i) own[i] = 0.0f;
        const uint32_t keys_at = shared + 4 * (at + (((lane >> 4) << 3) + (lane & 7)) * PITCH + ((lane >> 3) & 1) * 4);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int group = 0; group < KEYS / 16; ++group) {
                ldmatrix(b, keys_at + 4 * (group * 16 * PITCH + step * 8));
                add_product(own + group * 8, kept[step], b[0], b[1]);
                add_product(own + group * 8 + 4, kept[step], b[2], b[3]);
            }
        }
        if (!(first_key >= low_last && first_key + KEYS - 1 <= first_position)) {
            const uint4 limits = state[0];
            const int low_a = limits.x, seen_a = limits.y, low_b = limits.z, seen_b = limits.w;
#pragma unroll
            for (int i = 0; i < SCORES; i += 4) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int key = first_key + (lane & 3) * 2 + (i / 4) * 8 + e;
                    if (key < low_a || key > seen_a) own[i + e] = neg_inf();
                    if (key < low_b || key > seen_b) own[i + 2 + e] = neg_inf();
                }
            }
        }

        // one step of the online softmax
        float top_a = running[0], top_b = running[1];
#pragma unroll
        for (int i = 0; i < SCORES; i += 4) {
            top_a = fmaxf(top_a, fmaxf(own[i], own[i + 1]));
            top_b = fmaxf(top_b, fmaxf(own[i + 2], own[i + 3]));
        }
        top_a = quad_max(top_a);
        top_b = quad_max(top_b);
        const float base_a = top_a == neg_inf() ? 0.0f : top_a, base_b = top_b == neg_inf() ? 0.0f : top_b;
        const float decay_a = exp2_approx(running[0] - base_a), decay_b = exp2_approx(running[1] - base_b);
        running[0] = top_a;
        running[1] = top_b;
        float sum_a = 0.0f, sum_b = 0.0f;
#pragma unroll
        for (int n = 0; n < SCORES / 4; ++n) {
            const float p0 = exp2_approx(own[n * 4] - base_a), p1 = exp2_approx(own[n * 4 + 1] - base_a);
            const float p2 = exp2_approx(own[n * 4 + 2] - base_b), p3 = exp2_approx(own[n * 4 + 3] - base_b);
            sum_a = sum_a + (p0 + p1);
            sum_b = sum_b + (p2 + p3);
            probs[n * 2] = pack(p0, p1);
            probs[n * 2 + 1] = pack(p2, p3);
        }
        running[2] = __fmaf_rn(running[2], decay_a, sum_a);
        running[3] = __fmaf_rn(running[3], decay_b, sum_b);
#pragma unroll
        for (int i = 0; i < OUTPUTS; i += 4) {
            o[i] *= decay_a;
            o[i + 1] *= decay_a;
            o[i + 2] *= decay_b;
            o[i + 3] *= decay_b;
        }

        // O += P V
        const uint32_t values_at = shared + 4 * (at + TILE_WORDS + (lane & 15) * PITCH + (lane >> 4) * 4);
#pragma unroll
        for (int group = 0; group < STEPS; ++group) {
#pragma unroll
            for (int step = 0; step < KEYS / 16; ++step) {
                ldmatrix_trans(b, values_at + 4 * (group * 8 + step * 16 * PITCH));
                add_product(o + group * 8, probs + step * 4, b[0], b[1]);
                add_product(o + group * 8 + 4, probs + step * 4, b[2], b[3]);
            }
        }
        ++tile;
        if ((tile & (TILES_PER_SPLIT - 1)) == 0 || tile > end_tile) {
            float4 so_far = *merged_state;
            merge_row(so_far.x, so_far.z, running[0], quad_sum(running[2]), 0, o, merged);
            merge_row(so_far.y, so_far.w, running[1], quad_sum(running[3]), 1, o, merged);
            *merged_state = so_far;
            running[0] = running[1] = neg_inf();
            running[2] = running[3] = 0.0f;
#pragma unroll
            for (int i = 0; i < OUTPUTS; ++i) o[i] = 0.0f;
        }
    }

    const int to_a = state[THREADS].x, to_b = state[THREADS].y;
    const float4 all = *merged_state;
    const float ln_2 = 0.693147182464599609375f;
    if (t == 0 && to_a >= 0) lse[to_a] = (all.x + log2_approx(all.z)) * ln_2;
    if (t == 0 && to_b >= 0) lse[to_b] = (all.y + log2_approx(all.w)) * ln_2;
    const float scale_a = all.z != 0.0f ? rcp_approx(all.z) : 0.0f, scale_b = all.w != 0.0f ? rcp_approx(all.w) : 0.0f;
#pragma unroll
    for (int i = 0; i < OUTPUTS; i += 4) {
        merged[i] *= scale_a;
        merged[i + 1] *= scale_a;
        merged[i + 2] *= scale_b;
        merged[i + 3] *= scale_b;
    }
    write_rows(out, to_a, to_b, t, merged);
}
