// The operator of a linear outside the experts.
#include <algorithm>
#include <numeric>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "call.h"

namespace {

using at::Tensor;
using namespace moeq;

// Returns x · Wᵀ [tokens, rows] in x's dtype, for x [tokens, columns] and W [rows, columns] from native_repack. `wide`:
// W's scales and zeros are float32.
Tensor linear(const Tensor& x, const Tensor& weight, int64_t rows, int64_t bits, int64_t group_size, bool wide, int64_t isa) {
    TORCH_CHECK(x.dim() == 2 && x.size(1) % kChunk == 0, "expected x [tokens, a multiple of ", kChunk, "], found ", x.sizes());
    TORCH_CHECK((bits >= 1 && bits <= 4) || bits == 8, "expected 1, 2, 3, 4 or 8 bits, found ", bits);
    TORCH_CHECK(group_size > 0 && group_size % kChunk == 0, "expected groups of a multiple of ", kChunk);
    const Tensor input = x.contiguous();
    const std::vector<Segment> segments = make_segments(x.size(1), group_size, 0);
    LinearCall call{};
    call.dtype = dtype_of(input);
    call.digits = digits_of(call.dtype);
    call.rows = rows;
    call.bits = bits;
    Matrices& m = call.weights;
    m.data = weight.const_data_ptr<uint8_t>();
    m.segments = segments.data();
    m.num_segments = static_cast<int32_t>(segments.size());
    m.columns = static_cast<int32_t>(x.size(1));
    m.panels = static_cast<int32_t>(panels_of(rows, false));
    m.wide = wide;
    Tensor out = at::empty({x.size(0), rows}, input.options());
    if (!out.numel() || segments.empty()) return out.zero_();
    m.groups = segments.back().group + 1;
    TORCH_CHECK(reinterpret_cast<uintptr_t>(m.data) % kVector == 0, "expected weights aligned to 64 bytes");
    const int64_t bytes = m.panels * panel_bytes(m, {bits, kGrid});
    TORCH_CHECK(weight.numel() == bytes, "expected ", bytes, " bytes of weights, found ", weight.numel());
    const Kernel& kernel = find_kernel(isa);
    const int64_t item = static_cast<int64_t>(input.element_size());
    call.panels = std::max(1, m.panels / (8 * at::get_num_threads()));
    for (int64_t first = 0; first < x.size(0); first += kTokensPerPart) {
        call.tokens = std::min(kTokensPerPart, x.size(0) - first);
        call.x = static_cast<const char*>(input.const_data_ptr()) + first * m.columns * item;
        call.out = static_cast<char*>(out.mutable_data_ptr()) + first * rows * item;
        call.planes = planes_of(0, call.tokens, m, call.digits);
        int32_t* token = scratch.get<int32_t>(6, call.tokens);
        std::iota(token, token + call.tokens, 0);
        call.token = token;
        call.next = 0;
        in_parallel([&](int thread, int count) { kernel.linear(&call, thread, count); });
    }
    return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_moeq, library) {
    library.def(
        "native_linear(Tensor x, Tensor weight, int rows, int bits, int group_size, bool wide, int isa) -> Tensor");
}

TORCH_LIBRARY_IMPL(vllm_moeq, CPU, library) { library.impl("native_linear", &linear); }
