// The operators of a layer. All their inputs are tensors and numbers, so that they can be traced; between calls they
// keep only scratch memory.
#include <sys/mman.h>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "call.h"

namespace {

using at::Tensor;
using namespace moeq;

struct Layer {
    std::vector<Segment> up_segments, down_segments;
    Matrices gate_up, down;
};

// A layer's description is one int64 tensor, because torch would unpack many arguments in every call.
enum Number {
    kHidden, kIntermediate, kUpGroup, kDownGroup, kDownOffset, kWide, kIsa, kUpRotation, kDownRotation,
    kFunction, kGated, kBounded, kUpBias, kDownBias, kNumbers
};
constexpr int kFactors = 3;  // the floats of an activation: alpha, limit, beta
constexpr int kPerExpert = 4;  // then follow, per expert: width, scheme, first byte of gate and up, first byte of down

Layer describe(const Tensor& gate_up, const Tensor& down, const int64_t* numbers) {
    const int64_t hidden = numbers[kHidden], intermediate = numbers[kIntermediate];
    Layer layer;
    layer.up_segments = make_segments(hidden, numbers[kUpGroup], 0);
    layer.down_segments = make_segments(intermediate, numbers[kDownGroup], numbers[kDownOffset]);
    const auto fill = [&](Matrices& m, const Tensor& data, int column, const std::vector<Segment>& segments) {
        m.data = data.const_data_ptr<uint8_t>();
        TORCH_CHECK(reinterpret_cast<uintptr_t>(m.data) % kVector == 0, "expected weights aligned to 64 bytes");
        m.offsets = numbers + kNumbers + column;
        m.stride = kPerExpert;
        m.segments = segments.data();
        m.num_segments = static_cast<int32_t>(segments.size());
        m.groups = segments.back().group + 1;
        m.wide = static_cast<int32_t>(numbers[kWide]);
    };
    fill(layer.gate_up, gate_up, 2, layer.up_segments);
    fill(layer.down, down, 3, layer.down_segments);
    layer.gate_up.columns = static_cast<int32_t>(hidden);
    const bool gated = numbers[kGated] != 0;
    layer.gate_up.panels = static_cast<int32_t>(panels_of(gated ? 2 * intermediate : intermediate, gated));
    layer.down.columns = static_cast<int32_t>(intermediate);
    layer.down.panels = static_cast<int32_t>(panels_of(hidden, false));
    return layer;
}

void run_part(const Kernel& kernel, Call& call, const int32_t* ids, const float* weights, int64_t top_k,
              int64_t experts) {
    const Routing routing = sort_pairs(ids, weights, call.tokens, top_k, experts);
    const int threads = at::get_num_threads();
    call.active = routing.active.data();
    call.num_active = static_cast<int32_t>(routing.active.size());
    call.token = routing.token.data();
    call.weight = routing.weight.data();
    call.pair = routing.pair.data();
    call.pairs = static_cast<int64_t>(routing.pair.size());
    call.x_planes = planes_of(0, call.tokens, call.gate_up, call.digits);
    call.hidden_planes = planes_of(2, call.pairs, call.down, call.digits);
    if (call.before_up.size) call.rotated = scratch.get<float>(7, call.tokens * call.hidden);
    call.inner = scratch.get<float>(4, call.pairs * call.intermediate);
    call.sums = scratch.get<float>(5, call.tokens * call.down.panels * kPanelRows);
    const std::vector<Item> items = make_items(call, threads);
    call.items = items.data();
    call.num_items = static_cast<int32_t>(items.size());
    call.down_panels = std::max(1, call.down.panels / (8 * threads));
    call.next_gate_up = call.next_down = 0;
    in_parallel([&](int thread, int count) { kernel.run(&call, thread, count); });
}

// floats: the activation's, then factors of the layer's input, if it is rotated, and of down's input, if that is, then
// the biases of gate and up and those of down, if there are any.
void set_floats(Call& call, const int64_t* numbers, int64_t experts, const Tensor& floats) {
    const int64_t up = numbers[kUpRotation] ? call.hidden : 0, down = numbers[kDownRotation] ? call.intermediate : 0;
    const int64_t up_bias = numbers[kUpBias] ? experts * call.gate_up.panels * kPanelRows : 0;
    const int64_t down_bias = numbers[kDownBias] ? experts * call.down.panels * kPanelRows : 0;
    const int64_t count = kFactors + up + down + up_bias + down_bias;
    TORCH_CHECK(floats.is_contiguous() && floats.numel() == count, "expected ", count, " floats of a layer, found ",
                floats.numel());
    const float* first = floats.const_data_ptr<float>();
    const auto number = [&](Number which) { return static_cast<int32_t>(numbers[which]); };
    call.activation = {number(kFunction), number(kGated), number(kBounded), first[0], first[1], first[2]};
    first += kFactors;
    call.before_up = {first, number(kUpRotation)};
    call.before_down = {first + up, number(kDownRotation)};
    first += up + down;
    call.gate_up.bias = up_bias ? first : nullptr;
    call.down.bias = down_bias ? first + up_bias : nullptr;
}

Tensor moe(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids, const Tensor& gate_up,
           const Tensor& down, const Tensor& layer, const Tensor& floats) {
    TORCH_CHECK(layer.is_contiguous() && layer.numel() >= kNumbers, "expected the numbers of a layer");
    const int64_t* numbers = layer.const_data_ptr<int64_t>();
    TORCH_CHECK(x.dim() == 2 && x.size(1) == numbers[kHidden], "expected x [tokens, ", numbers[kHidden], "], found ",
                x.sizes());
    TORCH_CHECK(topk_ids.dim() == 2 && topk_ids.size(0) == x.size(0) && topk_ids.sizes() == topk_weights.sizes(),
                "expected routing weights and indices [tokens, top-k]");
    const Tensor input = x.contiguous(), ids = topk_ids.to(at::kInt).contiguous();
    const Tensor weights = topk_weights.to(at::kFloat).contiguous();
    Tensor out = at::empty(input.sizes(), input.options());
    if (!input.numel()) return out;
    const Layer described = describe(gate_up, down, numbers);
    const Kernel& kernel = find_kernel(numbers[kIsa]);
    Call call{};
    call.dtype = dtype_of(input);
    call.digits = digits_of(call.dtype);
    call.hidden = numbers[kHidden];
    call.intermediate = numbers[kIntermediate];
    call.gate_up = described.gate_up;
    call.down = described.down;
    const int64_t experts = (layer.numel() - kNumbers) / kPerExpert;
    set_floats(call, numbers, experts, floats);
    call.codings = numbers + kNumbers;
    call.codings_stride = kPerExpert;
    const int64_t top_k = ids.size(1), row = call.hidden * static_cast<int64_t>(input.element_size());
    for (int64_t first = 0; first < input.size(0); first += kTokensPerPart) {
        call.tokens = std::min(kTokensPerPart, input.size(0) - first);
        call.x = static_cast<const char*>(input.const_data_ptr()) + first * row;
        call.out = static_cast<char*>(out.mutable_data_ptr()) + first * row;
        run_part(kernel, call, ids.const_data_ptr<int32_t>() + first * top_k,
                 weights.const_data_ptr<float>() + first * top_k, top_k, experts);
    }
    return out;
}

// Asks for large pages; only a hint, which may fail.
void advise_huge(uint8_t* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = uintptr_t{1} << 21, begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// One expert's numbers for native_repack.
struct Loaded {
    Coding coding;
    int64_t word, index;  // first word, and place among the scheme's experts
};
static_assert(sizeof(Loaded) == 4 * sizeof(int64_t));

Source source_of(const Loaded& expert, at::TensorList tensors, int64_t rows, int64_t columns, int64_t groups,
                 bool gated) {
    const Tensor &words = tensors[0], &scales = tensors[1];
    const int64_t skipped = expert.index * rows * groups * scales.element_size();
    const auto values = [&](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()) + skipped; };
    return {reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>()) + expert.word, values(scales),
            tensors.size() > 2 ? values(tensors[2]) : nullptr, rows, columns, groups, expert.coding,
            scales.scalar_type() == at::kFloat, gated};
}

// Returns one projection of a layer in the order of core.h, and writes each expert's first byte to `offsets` [E].
// grid: words, scales and zeros of the experts of this scheme. trellis: words and scales. experts: int64 [E, 4], a
// Loaded each. numbers: rows, columns, group size, offset within a group, 1 for gate and up.
Tensor repack(at::TensorList grid, at::TensorList trellis, const Tensor& experts, at::IntArrayRef numbers,
              Tensor& offsets) {
    const at::TensorList schemes[] = {grid, trellis};  // in the order of Scheme
    const bool wide = (grid.empty() ? trellis : grid)[1].scalar_type() == at::kFloat;
    for (const at::TensorList& tensors : schemes) {
        for (const Tensor& tensor : tensors) TORCH_CHECK(tensor.is_contiguous());
        TORCH_CHECK(tensors.empty() || (tensors[1].scalar_type() == at::kFloat) == wide, "expected one dtype of scales");
    }
    const int64_t rows = numbers[0], columns = numbers[1], count = experts.size(0);
    const bool gated = numbers[4] != 0;
    const std::vector<Segment> segments = make_segments(columns, numbers[2], numbers[3]);
    Matrices m{};
    m.columns = static_cast<int32_t>(columns);
    m.segments = segments.data();
    m.num_segments = static_cast<int32_t>(segments.size());
    m.groups = segments.back().group + 1;
    m.wide = wide;
    m.panels = static_cast<int32_t>(panels_of(rows, gated));
    const Loaded* table = reinterpret_cast<const Loaded*>(experts.const_data_ptr<int64_t>());
    int64_t* first = offsets.mutable_data_ptr<int64_t>();
    int64_t total = 0;
    for (int64_t e = 0; e < count; ++e) {
        first[e] = total;
        total += m.panels * panel_bytes(m, table[e].coding);
    }
    Tensor out = at::empty({total}, offsets.options().dtype(at::kByte));
    uint8_t* data = out.mutable_data_ptr<uint8_t>();
    TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % kVector == 0, "expected memory aligned to 64 bytes");
    advise_huge(data, total);
    at::parallel_for(0, count * m.panels, 1, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const int64_t e = i / m.panels, panel = i % m.panels;
            const Coding coding = table[e].coding;
            const int64_t groups = coding.scheme == kTrellis ? 1 : m.groups;
            const Source source = source_of(table[e], schemes[coding.scheme], rows, columns, groups, gated);
            repack_panel(source, m, panel, data + first[e] + panel * panel_bytes(m, coding));
        }
    });
    return out;
}

std::string isas() {
    std::string names;
    for (const Kernel& kernel : kernels()) names += (names.empty() ? "" : ",") + kernel.name;
    return names;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_moeq, library) {
    library.def(
        "native_moe(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor gate_up, Tensor down, Tensor layer, "
        "Tensor floats) -> Tensor");
    library.def(
        "native_repack(Tensor[] grid, Tensor[] trellis, Tensor experts, int[] numbers, Tensor(a!) offsets) -> Tensor");
    library.def("native_isas() -> str", &isas);
}

TORCH_LIBRARY_IMPL(vllm_moeq, CPU, library) {
    library.impl("native_moe", &moe);
    library.impl("native_repack", &repack);
}
