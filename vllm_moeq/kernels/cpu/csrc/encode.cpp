// The operator that finds the codes of a trellis.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "call.h"
#include "encode_call.h"

namespace {

using at::Tensor;
using namespace moeq;

// Returns the bits that each weight adds to its tile's ring, uint8 [tiles, 256]. weights: float32 [tiles, 256] in units of
// codes. codes: int16 [4096], twice the code of each state; its index has the oldest bits on top.
Tensor encode(const Tensor& weights, const Tensor& codes, int64_t bits, int64_t isa) {
    TORCH_CHECK(weights.dim() == 2 && weights.size(1) == 256 && weights.scalar_type() == at::kFloat,
                "expected float32 weights [tiles, 256], found ", weights.scalar_type(), " ", weights.sizes());
    TORCH_CHECK(codes.numel() == 4096 && codes.scalar_type() == at::kShort && codes.is_contiguous(),
                "expected 4096 codes in int16");
    TORCH_CHECK(bits >= 1 && bits <= 4, "expected 1, 2, 3 or 4 bits, found ", bits);
    const Tensor input = weights.contiguous();
    Tensor own = at::empty(input.sizes(), input.options().dtype(at::kByte));
    const Encode run = find_kernel(isa).encode;
    at::parallel_for(0, input.size(0), 4, [&](int64_t first, int64_t last) {
        EncodeCall call{};
        call.weights = input.const_data_ptr<float>() + first * 256;
        call.own = own.mutable_data_ptr<uint8_t>() + first * 256;
        call.codes = reinterpret_cast<const uint16_t*>(codes.const_data_ptr<int16_t>());
        call.memory = scratch.get<uint8_t>(7, kEncoderBytes);
        call.tiles = last - first;
        call.bits = bits;
        run(call);
    });
    return own;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_moeq, library) {
    library.def("native_encode(Tensor weights, Tensor codes, int bits, int isa) -> Tensor");
}

TORCH_LIBRARY_IMPL(vllm_moeq, CPU, library) { library.impl("native_encode", &encode); }
