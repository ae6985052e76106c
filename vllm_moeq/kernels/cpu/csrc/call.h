// Code that the operators share: scratch memory, threads, the choice of a kernel.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "host.h"

namespace moeq {

// A batch is computed in parts of this many tokens, so that scratch memory does not grow with the batch.
constexpr int64_t kTokensPerPart = 512;

// Memory of the calling thread, kept between calls because fresh pages cost more than a call. It only grows.
class Scratch {
   public:
    template <class T>
    T* get(int slot, int64_t count) {
        Buffer& buffer = buffers_[slot];
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
        if (buffer.bytes < bytes) {
            buffer.memory.reset(std::aligned_alloc(256, bytes));
            buffer.bytes = bytes;
            if (!buffer.memory) throw std::bad_alloc();
        }
        return static_cast<T*>(buffer.memory.get());
    }

   private:
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    struct Buffer {
        std::unique_ptr<void, Free> memory;
        size_t bytes = 0;
    };
    Buffer buffers_[8];
};

inline thread_local Scratch scratch;

inline Planes planes_of(int slot, int64_t rows, const Matrices& m, int64_t digits) {
    Planes planes;
    planes.digits = scratch.get<int8_t>(slot, rows * m.columns * digits);
    planes.scale = scratch.get<float>(slot + 1, rows * m.num_segments * 2);
    planes.sum = planes.scale + rows * m.num_segments;
    planes.rows = rows;
    return planes;
}

inline const Kernel& find_kernel(int64_t index) {
    static const std::vector<Kernel> found = kernels();
    TORCH_CHECK(index < static_cast<int64_t>(found.size()), "this processor has no kernel ", index);
    return index < 0 ? found.back() : found[index];
}

template <class F>
void in_parallel(F&& work) {
#ifdef _OPENMP
    const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        work(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    work(0, 1);
}

inline int32_t dtype_of(const at::Tensor& x) {
    if (x.scalar_type() == at::kFloat) return kFloat32;
    if (x.scalar_type() == at::kBFloat16) return kBfloat16;
    TORCH_CHECK(x.scalar_type() == at::kHalf, "expected float32, bfloat16 or float16, found ", x.scalar_type());
    return kFloat16;
}

// Two digits lose far less than rounding to bfloat16 does, and four digits far less than rounding to float32.
inline int32_t digits_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

}  // namespace moeq
