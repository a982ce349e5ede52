// Attention of the CPU step. exact: a task is one head over its whole context, in stock's order.
// fp32 modes: a task is up to kHeads heads of one key head over a chunk of the slots, so that a
// slot is read once for all of them; each chunk leaves its maximum, its sum of exponentials and its
// weighted sum of values, and the chunks are merged in ascending order. How a row is cut depends on
// its length alone.
#pragma once

#include "cpu/tiles.h"
#include "decode/cpu_worker.h"

namespace moefuse {

constexpr int kHeads = 32, kMostChunks = 32;
constexpr int kFirstBytes = 16384;

// Slots in a chunk of a row that attends to n: enough chunks to go round, not so many that the
// merge costs.
inline int chunk_slots(int n) {
  constexpr int kLeast = 128;
  return (n + kLeast * kMostChunks - 1) / (kLeast * kMostChunks) * kLeast;
}
inline int chunk_count(int n) {
  return (n + chunk_slots(n) - 1) / chunk_slots(n);
}

template <class A>
cpu::RowsArgs CpuStep<A>::Worker::cached(bool keys, int r, int head) const {
  const StepRow& row = shared_.rows[r];
  const CacheView& cache = shared_.caches[layer_];
  const int dim = keys ? shared_.cache_shape.key_dim : shared_.cache_shape.value_dim;
  const int64_t first =
      (int64_t(row.sequence) * shared_.cache_shape.kv_heads + head) * cache.slots + row.first;
  const int size = cpu::itemsize(shared_.cache_dtype);
  return {(keys ? cache.keys : cache.values) + first * dim * size, shared_.cache_dtype, dim,
          row.slot - row.first + 1, dim};
}

template <class A>
void CpuStep<A>::Worker::append(bool keys, int r, int head, const A* x) const {
  const cpu::RowsArgs to = cached(keys, r, head);
  const auto copy = [&](auto* out) {
    for (int i = 0; i < to.dim; ++i)
      out[i] = static_cast<std::remove_pointer_t<decltype(out)>>(x[i]);
  };
  char* slot = static_cast<char*>(const_cast<void*>(to.data));
  const int64_t at = int64_t(to.rows - 1) * to.dim;
  if (to.dtype == cpu::Dtype::float32) return copy(reinterpret_cast<float*>(slot) + at);
  if (to.dtype == cpu::Dtype::float16) return copy(reinterpret_cast<mx::float16_t*>(slot) + at);
  copy(reinterpret_cast<mx::bfloat16_t*>(slot) + at);
}

template <class A>
void CpuStep<A>::Worker::run(const GroupedAttention& s) {
  const int kv = s.kv_heads, dim = s.head_dim, each = s.heads + 2 * kv;
  const auto scale = static_cast<A>(s.scale);
  team_.share(thread_, rows() * each, [&](int task) {
    const int r = task / each, head = task % each, position = shared_.rows[r].position;
    if (head < s.heads) {
      A* q = shared_.q.data() + (int64_t(r) * s.heads + head) * dim;
      norm(s.q_norm, q, q);
      shared_.rope.rotate(q, position);
      for (int i = 0; i < dim; ++i) q[i] = scale * q[i];
    } else if (head < s.heads + kv) {
      A* k = shared_.k.data() + (int64_t(r) * kv + head - s.heads) * dim;
      norm(s.k_norm, k, k);
      shared_.rope.rotate(k, position);
      append(true, r, head - s.heads, k);
    } else {
      const int h = head - s.heads - kv;
      append(false, r, h, shared_.v.data() + (int64_t(r) * kv + h) * dim);
    }
  });
  attend({{true, shared_.q.data()}}, false, s.heads, shared_.attended.data());
}

template <class A>
void CpuStep<A>::Worker::run(const LatentQuery& s) {
  const int head_dim = s.nope_dim + s.rope_dim, compressed = s.q_b.cols;
  normed_.resize(int64_t(rows()) * compressed);
  for (int r = 0; r < rows(); ++r)
    norm(s.q_a_norm, shared_.q.data() + int64_t(r) * compressed,
         normed_.data() + int64_t(r) * compressed);
  x_.set(normed_.data(), rows(), compressed);
  const int q_width = s.heads * head_dim;
  scratch_.resize(int64_t(rows()) * (q_width + s.nope_dim));
  A* nope = scratch_.data() + int64_t(rows()) * q_width;
  team_.share(thread_, s.heads + 1, [&](int head) {
    if (head == s.heads) {
      for (int r = 0; r < rows(); ++r) {
        A* latent = shared_.k.data() + int64_t(r) * (s.latent_dim + s.rope_dim);
        norm(s.kv_a_norm, latent, latent);
        shared_.rope.rotate(latent + s.latent_dim, shared_.rows[r].position);
        append(true, r, 0, latent);
        append(false, r, 0, latent + s.latent_dim);
      }
      return;
    }
    x_.project(view(s.q_b), scratch_.data(), q_width, head * head_dim, (head + 1) * head_dim);
    for (int r = 0; r < rows(); ++r) {
      const A* q = scratch_.data() + int64_t(r) * q_width + head * head_dim;
      A* rotary = shared_.q_rope.data() + (int64_t(r) * s.heads + head) * s.rope_dim;
      std::copy_n(q, s.nope_dim, nope + int64_t(r) * s.nope_dim);
      std::copy_n(q + s.nope_dim, s.rope_dim, rotary);
      shared_.rope.rotate(rotary, shared_.rows[r].position);
    }
    inner_.set(nope, rows(), s.nope_dim);
    inner_.project(view(s.embed_q, head), shared_.q_latent.data() + int64_t(head) * s.latent_dim,
                   int64_t(s.heads) * s.latent_dim, 0, s.latent_dim);
  });
}

template <class A>
void CpuStep<A>::Worker::run(const LatentAttention& s) {
  const auto scale = static_cast<A>(s.scale);
  team_.share(thread_, rows() * s.heads, [&](int task) {
    A* latent = shared_.q_latent.data() + int64_t(task) * s.latent_dim;
    A* rotary = shared_.q_rope.data() + int64_t(task) * s.rope_dim;
    for (int i = 0; i < s.latent_dim; ++i) latent[i] = scale * latent[i];
    for (int i = 0; i < s.rope_dim; ++i) rotary[i] = scale * rotary[i];
  });
  attend({{true, shared_.q_latent.data()}, {false, shared_.q_rope.data()}}, true, s.heads,
         shared_.latents.data());
}

template <class A>
void CpuStep<A>::Worker::run(const LatentOutput& s) {
  const int heads = s.unembed.count, latent = s.unembed.cols, values = s.unembed.rows;
  scratch_.resize(int64_t(rows()) * latent);
  team_.share(thread_, heads, [&](int head) {
    for (int r = 0; r < rows(); ++r)
      std::copy_n(shared_.latents.data() + (int64_t(r) * heads + head) * latent, latent,
                  scratch_.data() + int64_t(r) * latent);
    inner_.set(scratch_.data(), rows(), latent);
    inner_.project(view(s.unembed, head), shared_.attended.data() + int64_t(head) * values,
                   int64_t(heads) * values, 0, values);
  });
}

// out [rows, heads, dim of the values]
template <class A>
void CpuStep<A>::Worker::attend(std::initializer_list<Part> parts, bool values_in_keys, int heads,
                                A* out) {
  if constexpr (kExact<A>) {
    team_.share(thread_, rows() * heads,
                [&](int task) { attend_exact(parts, values_in_keys, heads, task, out); });
  } else {
    const int kv = shared_.cache_shape.kv_heads;
    const int groups = kv * ((heads / kv + kHeads - 1) / kHeads);
    tile_group_ = -1;
    team_.share(thread_, rows() * groups * chunks(),
                [&](int task) { attend_chunk(parts, values_in_keys, heads, task); });
    const int dim = values_in_keys ? shared_.cache_shape.key_dim : shared_.cache_shape.value_dim;
    team_.share(thread_, rows() * heads, [&](int task) { merge_chunks(heads, dim, task, out); });
  }
}

template <class A>
void CpuStep<A>::Worker::attend_exact(std::initializer_list<Part> parts, bool values_in_keys,
                                      int heads, int task, A* out) {
  const int r = task / heads, kv_head = task % heads / (heads / shared_.cache_shape.kv_heads);
  const int n = shared_.rows[r].slot - shared_.rows[r].first + 1;
  scores_.assign(n, A(0.0f));
  floats_.resize(n);
  bool first = true;
  for (const Part& part : parts) {
    const cpu::RowsArgs keys = cached(part.keys, r, kv_head);
    queries_.resize(keys.dim);
    std::copy_n(part.queries + int64_t(task) * keys.dim, keys.dim, queries_.begin());
    cpu::kernels().dots(true, keys, queries_.data(), 1, floats_.data(), n);
    for (int j = 0; j < n; ++j) {
      const auto score = static_cast<A>(floats_[j]);
      scores_[j] = first ? score : scores_[j] + score;
    }
    first = false;
  }
  cpu::precise_softmax(scores_.data(), scores_.data(), n);
  std::copy(scores_.begin(), scores_.end(), floats_.begin());
  const cpu::RowsArgs values = cached(values_in_keys, r, kv_head);
  queries_.resize(values.dim);
  cpu::kernels().weighted_sum(true, values, floats_.data(), 1, n, queries_.data());
  std::copy_n(queries_.begin(), values.dim, out + int64_t(task) * values.dim);
}

template <class A>
int CpuStep<A>::Worker::chunks() const {
  int most = 0;
  for (const StepRow& row : shared_.rows)
    most = std::max(most, chunk_count(row.slot - row.first + 1));
  return most;
}

// Leaves, for each head of the task: the maximum, the sum, the weighted values.
template <class A>
void CpuStep<A>::Worker::attend_chunk(std::initializer_list<Part> parts, bool values_in_keys,
                                      int heads, int task) {
  const int per_kv = heads / shared_.cache_shape.kv_heads;
  const int groups = (per_kv + kHeads - 1) / kHeads;
  const int chunk = task % chunks(), group = task / chunks();
  const int kv_head = group / groups % shared_.cache_shape.kv_heads;
  const int r = group / groups / shared_.cache_shape.kv_heads;
  const int head = kv_head * per_kv + group % groups * kHeads;
  const int count = std::min(kHeads, (kv_head + 1) * per_kv - head);
  const int slots = chunk_slots(shared_.rows[r].slot - shared_.rows[r].first + 1);
  const auto slice = [&](bool keys) {
    cpu::RowsArgs rows = cached(keys, r, kv_head);
    const int size = cpu::itemsize(rows.dtype);
    rows.data = static_cast<const char*>(rows.data) + int64_t(chunk) * slots * rows.dim * size;
    rows.rows = std::min(slots, rows.rows - chunk * slots);
    return rows;
  };
  const cpu::RowsArgs values = slice(values_in_keys);
  const int n = values.rows, dim = values.dim;
  if (n <= 0) return;
  std::vector<ChunkPart>& keys = chunk_parts_;
  keys.clear();
  for (const Part& part : parts) {
    const cpu::RowsArgs rows = slice(part.keys);
    const auto* q = reinterpret_cast<const float*>(part.queries);
    keys.push_back({rows, q + (int64_t(r) * heads + head) * rows.dim});
  }
  // The first of the values; the kernel asks for the rest as it goes.
  for (int i = 0; !values_in_keys && i < kFirstBytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(values.data) + i, 0, 2);
  const cpu::Tiles* tiles = tiles_for(values, count);
  if (tiles)
    score_on_tiles(*tiles, count, slots, group);
  else
    score(count, slots);
  // One head's results lie `stride` behind the last's.
  const int64_t stride = int64_t(chunks()) * (dim + 2);
  float* out = shared_.partial.data() + (int64_t(r) * heads + head) * stride + chunk * (dim + 2);
  float* scores = floats_.data();
  for (int h = 0; h < count; ++h)
    out[h * stride + 1] = cpu::kernels().exponentials(scores + h * slots, n, out + h * stride);
  if (tiles) {
    tiles->weighted_sum(values, scores, count, slots, out + 2, stride, !values_in_keys);
    return;
  }
  sums_.resize(size_t(count) * dim);
  cpu::kernels().weighted_sum(false, values, scores, count, slots, sums_.data());
  for (int h = 0; h < count; ++h) std::copy_n(sums_.data() + h * dim, dim, out + h * stride + 2);
}

// Tiles for `count` heads on the chunk's keys and values, if they take them.
template <class A>
const cpu::Tiles* CpuStep<A>::Worker::tiles_for(const cpu::RowsArgs& values, int count) const {
  if (shared_.accumulate != Accumulate::fp32 || count < cpu::kLeastTileHeads) return nullptr;
  bool fit = cpu::fit_tiles(values, count);
  int dim = 0;
  for (const ChunkPart& part : chunk_parts_) {
    fit = fit && cpu::fit_tiles(part.keys, count);
    dim += part.keys.dim;
  }
  return fit && dim <= cpu::Tiles::kMaxDim ? cpu::tiles() : nullptr;
}

// floats_ [count, slots] = the scores of the chunk's parts.
template <class A>
void CpuStep<A>::Worker::score(int count, int slots) {
  floats_.resize(2 * size_t(count) * slots);
  float *scores = floats_.data(), *more = scores + count * slots;
  for (const ChunkPart& part : chunk_parts_) {
    const bool first = &part == chunk_parts_.data();
    cpu::kernels().dots(false, part.keys, part.queries, count, first ? scores : more, slots);
    if (!first)
      for (int i = 0; i < count * slots; ++i) scores[i] += more[i];
  }
}

// The same. A group's queries become tiles with the first of its chunks that this thread takes.
template <class A>
void CpuStep<A>::Worker::score_on_tiles(const cpu::Tiles& tiles, int count, int slots, int group) {
  floats_.resize(size_t(count) * slots);
  tile_parts_.clear();
  int64_t bytes = 0;
  for (const ChunkPart& part : chunk_parts_) bytes += tiles.query_bytes(count, part.keys.dim);
  tile_queries_.resize(bytes);
  char* to = tile_queries_.data();
  for (const ChunkPart& part : chunk_parts_) {
    if (group != tile_group_) tiles.queries(part.queries, count, part.keys.dim, to);
    tile_parts_.push_back({part.keys, to});
    to += tiles.query_bytes(count, part.keys.dim);
  }
  tile_group_ = group;
  tiles.dots(tile_parts_.data(), int(tile_parts_.size()), count, floats_.data(), slots);
}

template <class A>
void CpuStep<A>::Worker::merge_chunks(int heads, int dim, int task, A* out) const {
  const StepRow& row = shared_.rows[task / heads];
  const int n = chunk_count(row.slot - row.first + 1);
  const float* partial = shared_.partial.data() + int64_t(task) * chunks() * (dim + 2);
  float top = partial[0];
  for (int c = 1; c < n; ++c) top = std::max(top, partial[int64_t(c) * (dim + 2)]);
  A* y = out + int64_t(task) * dim;
  std::fill_n(y, dim, A(0.0f));
  float sum = 0.0f;
  for (int c = 0; c < n; ++c) {
    const float* p = partial + int64_t(c) * (dim + 2);
    const float weight = cpu::stock_exp(p[0] - top);
    sum += weight * p[1];
    for (int i = 0; i < dim; ++i) y[i] = y[i] + static_cast<A>(weight * p[2 + i]);
  }
  const auto scale = static_cast<A>(1.0f / sum);
  for (int i = 0; i < dim; ++i) y[i] = y[i] * scale;
}

}  // namespace moefuse
