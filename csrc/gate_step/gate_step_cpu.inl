// gate_step's CPU kernels for one instruction set; see ../common/simd.inl for how this file is compiled.
// Bytes that must move: gate and buffer read and written once, grad read once. A block of columns is updated row by
// row while its maxima are kept in L1, then scaled in a second pass over the same, still cached, block.

constexpr int64_t kColumnBlock = 128;

// First maximum of each column so far; a NaN wins over every number, the first NaN over later ones.
template <typename A>
CSG_INLINE void update_top(const A* value, int64_t c, int64_t len, A* top, int64_t* where) {
  if (c == 0) {
    for (int64_t j = 0; j < len; ++j) top[j] = value[j], where[j] = 0;
    return;
  }
  for (int64_t j = 0; j < len; ++j) {
    const bool better = (value[j] > top[j]) | ((value[j] != value[j]) & (top[j] == top[j]));
    top[j] = better ? value[j] : top[j];
    where[j] = better ? c : where[j];
  }
}

// The updated values wait for their columns' maxima in the gate itself, half types in fp32 in `scratch` [C, len]: they
// are rounded once.
template <typename T>
CSG_INLINE void step_columns(const GateStep& p, int64_t k0, int64_t len, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  A gate[kColumnBlock], d[kColumnBlock], buffer[kColumnBlock], top[kColumnBlock];
  int64_t where[kColumnBlock];
  const A lr = A(p.lr), momentum = A(p.momentum), fresh = A(1 - p.dampening), decay = A(p.weight_decay);
  for (int64_t c = 0; c < p.c; ++c) {
    T* row = static_cast<T*>(p.gate) + c * p.k + k0;
    widen_block(gate, row, len);
    if (p.grad) {
      widen_block(d, static_cast<const T*>(p.grad) + c * p.k + k0, len);
      if (decay != 0)
        for (int64_t j = 0; j < len; ++j) d[j] += decay * gate[j];
      if (p.buffer) {
        T* kept = static_cast<T*>(p.buffer) + c * p.k + k0;
        if (p.first_step) {
          for (int64_t j = 0; j < len; ++j) buffer[j] = d[j];
        } else {
          widen_block(buffer, kept, len);
          for (int64_t j = 0; j < len; ++j) buffer[j] = momentum * buffer[j] + fresh * d[j];
        }
        narrow_block(kept, buffer, len);
        for (int64_t j = 0; j < len; ++j) d[j] = p.nesterov ? d[j] + momentum * buffer[j] : buffer[j];
      }
      for (int64_t j = 0; j < len; ++j) gate[j] -= lr * d[j];
    }
    if (scratch) {
      __builtin_memcpy(scratch + c * len, gate, size_t(len) * sizeof(A));
    } else if (p.grad) {
      narrow_block(row, gate, len);
    }
    update_top(gate, c, len, top, where);
  }
  for (int64_t c = 0; c < p.c; ++c) {
    T* row = static_cast<T*>(p.gate) + c * p.k + k0;
    if (scratch) {
      __builtin_memcpy(gate, scratch + c * len, size_t(len) * sizeof(A));
    } else {
      widen_block(gate, row, len);
    }
    if (p.projection == Projection::Scale) {
      for (int64_t j = 0; j < len; ++j) gate[j] = project_scale(gate[j], top[j], where[j] == c);
    } else {
      for (int64_t j = 0; j < len; ++j) gate[j] = project_euclidean(gate[j], top[j], where[j] == c);
    }
    narrow_block(row, gate, len);
  }
}
template <typename T>
CSG_INLINE void step_columns(const GateStep& p, int64_t k0, int64_t len) {
  constexpr bool beside = sizeof(T) < sizeof(Accumulator<T>);
  const Scratch scratch(beside ? p.c * len * int64_t(sizeof(Accumulator<T>)) : 0);
  step_columns<T>(p, k0, len, beside ? static_cast<Accumulator<T>*>(scratch.get()) : nullptr);
}

template <typename T>
CSG_INLINE void column_max_block(const ColumnMax& p, int64_t k0, int64_t len) {
  using A = Accumulator<T>;
  A value[kColumnBlock], top[kColumnBlock];
  for (int64_t c = 0; c < p.c; ++c) {
    widen_block(value, static_cast<const T*>(p.gate) + c * p.k + k0, len);
    update_top(value, c, len, top, p.col_arg + k0);
  }
  narrow_block(static_cast<T*>(p.col_max) + k0, top, len);
}

// Calls f<T>(k0, len) for every block of columns.
template <typename F>
CSG_INLINE void for_columns(int64_t c, int64_t k, ParallelFor parallel_for, F f) {
  const int64_t blocks = (k + kColumnBlock - 1) / kColumnBlock;
  const int64_t grain = max64(1, (32 << 10) / max64(1, c * min64(k, kColumnBlock)));
  parallel_ranges(parallel_for, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b * kColumnBlock, min64(kColumnBlock, k - b * kColumnBlock));
  });
}

void gate_step(const GateStep& p, ParallelFor parallel_for) {
  for_columns(p.c, p.k, parallel_for, [&](int64_t k0, int64_t len) {
    switch (p.type) {
      case ScalarType::Float32:
        return step_columns<float>(p, k0, len);
      case ScalarType::Float64:
        return step_columns<double>(p, k0, len);
      case ScalarType::Float16:
        return step_columns<Half>(p, k0, len);
      case ScalarType::BFloat16:
        return step_columns<BFloat16>(p, k0, len);
    }
  });
}

void column_max(const ColumnMax& p, ParallelFor parallel_for) {
  for_columns(p.c, p.k, parallel_for, [&](int64_t k0, int64_t len) {
    switch (p.type) {
      case ScalarType::Float32:
        return column_max_block<float>(p, k0, len);
      case ScalarType::Float64:
        return column_max_block<double>(p, k0, len);
      case ScalarType::Float16:
        return column_max_block<Half>(p, k0, len);
      case ScalarType::BFloat16:
        return column_max_block<BFloat16>(p, k0, len);
    }
  });
}
