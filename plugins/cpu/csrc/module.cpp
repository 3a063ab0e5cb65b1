// The Python face: functions that take addresses (tensor.data_ptr()), shapes and strides, and hold no lock meanwhile.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <vector>

#include "attention_plan.h"
#include "dispatch.h"
#include "embedding.h"
#include "linear.h"
#include "memory.h"
#include "pointwise.h"
#include "pool.h"
#include "quant.h"
#include "sampling.h"
#include "tape.h"
#include "trials.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace quire;

namespace {

using Address = uintptr_t;
using Unlocked = nb::call_guard<nb::gil_scoped_release>;

template <class T = void>
T* at(Address address) { return reinterpret_cast<T*>(address); }

// A matrix as Python passes it: (address, type, stride between rows in elements); address 0: none.
using Rows = std::tuple<Address, int, int64_t>;

Matrix matrix(const Rows& rows) { return {at(std::get<0>(rows)), DType(std::get<1>(rows)), std::get<2>(rows)}; }

void bind_linear(nb::module_& m) {
    m.def("packed_bytes",
          [](int64_t n, int64_t k, int type) { return packed_bytes(n, k, DType(type)); }, "n"_a, "k"_a, "type"_a);
    m.def("pack_weight",
          [](const Rows& w, int64_t n, int64_t k, Address packed) {
              const Matrix from = matrix(w);
              pack_weight(from.data, from.stride, n, k, from.type, at<char>(packed));
          },
          "w"_a, "n"_a, "k"_a, "packed"_a, Unlocked());
    m.def("linear",
          [](const Rows& x, int64_t rows, int64_t k, int64_t n, Address weight, int type, int activation,
             const Rows& bias, const Rows& residual, const Rows& out) {
              const Matrix b = matrix(bias);
              const LinearCall call = {matrix(x), rows, k, n, at<char>(weight), DType(type), Activation(activation),
                                       b.data, b.type, matrix(residual), matrix(out)};
              Tape::call([call] { linear(call); });
          },
          "x"_a, "rows"_a, "k"_a, "n"_a, "weight"_a, "type"_a, "activation"_a, "bias"_a, "residual"_a,
          "out"_a, Unlocked());
}

void bind_quant(nb::module_& m) {
    nb::class_<QuantShape>(m, "QuantShape", "Shape of a weight of integers.")
        .def("__init__",
             [](QuantShape* self, int64_t n, int64_t k, int bits, int group, bool zeros, int scales) {
                 new (self) QuantShape{n, k, bits, group, zeros, DType(scales)};
             },
             "n"_a, "k"_a, "bits"_a, "group"_a, "zeros"_a, "scales"_a)
        .def_prop_ro("bytes", [](const QuantShape& shape) { return packed_bytes(shape); });
    m.def("quant_pack_weight",
          [](const QuantShape& shape, Address q, Address scales, Address zeros, Address packed) {
              pack_weight(shape, at<uint8_t>(q), at<void>(scales), at<uint8_t>(zeros), at<char>(packed));
          },
          "shape"_a, "q"_a, "scales"_a, "zeros"_a, "packed"_a, Unlocked());
    m.def("quant_pack_rounded",
          [](const QuantShape& shape, const Rows& w, Address packed) {
              pack_rounded(shape, matrix(w), at<char>(packed));
          },
          "shape"_a, "w"_a, "packed"_a, Unlocked());
    m.def("quant_linear",
          [](const QuantShape& shape, const Rows& x, int64_t rows, Address weight, int activation, const Rows& bias,
             const Rows& residual, const Rows& out) {
              const Matrix b = matrix(bias);
              const QuantCall call = {shape, matrix(x), rows, at<char>(weight), Activation(activation), b.data, b.type,
                                      matrix(residual), matrix(out)};
              Tape::call([call] { linear(call); });
          },
          "shape"_a, "x"_a, "rows"_a, "weight"_a, "activation"_a, "bias"_a, "residual"_a, "out"_a, Unlocked());
}

void bind_attention(nb::module_& m) {
    nb::class_<KVLayout>(m, "KVLayout", "Shape of the pages of a KV group.")
        .def("__init__",
             [](KVLayout* self, int type, int layers, int kv_heads, int head_dim, int page_size) {
                 new (self) KVLayout{KVType(type), layers, kv_heads, head_dim, page_size};
             },
             "type"_a, "layers"_a, "kv_heads"_a, "head_dim"_a, "page_size"_a)
        .def_prop_ro("layer_bytes", &KVLayout::layer_bytes)
        .def_prop_ro("extent_bytes", &KVLayout::extent_bytes)
        .def_ro_static("extent_pages", &extent_pages);
    nb::class_<AttentionPlan>(m, "AttentionPlan", "The sequences of a step, and how layers share their work.")
        .def(nb::init<>())
        .def("update",
             [](AttentionPlan& plan, Address query_start, Address context_lens, int32_t sequences) {
                 plan.update(at<int32_t>(query_start), at<int32_t>(context_lens), sequences);
             },
             "query_start"_a, "context_lens"_a, "sequences"_a);
    m.def("write_kv",
          [](const KVLayout& layout, Address pool, int64_t slot_count, Address slots, int64_t tokens, const Rows& k,
             const Rows& v) {
              const WriteKVArgs args = {layout, at<char>(pool), at<int64_t>(slots), slot_count, matrix(k), matrix(v)};
              Tape::call([args, tokens] { write_kv(args, tokens); });
          },
          "layout"_a, "pool"_a, "slot_count"_a, "slots"_a, "tokens"_a, "k"_a, "v"_a, Unlocked());
    m.def("attention",
          [](AttentionPlan& plan, const KVLayout& layout, Address pool, Address block_tables,
             int64_t block_table_stride, int64_t tokens, const Rows& q, const Rows& out, int group, int64_t window,
             float scale, float soft_cap, Address sinks) {
              const AttentionArgs args = {layout, at<char>(pool), at<int32_t>(block_tables), block_table_stride,
                                          nullptr, nullptr, matrix(q), matrix(out), group, window, scale, soft_cap,
                                          at<float>(sinks), nullptr, nullptr};
              Tape::call([args, &plan, tokens] { attention(args, plan, args.layout.kv_heads, tokens); });
          },
          "plan"_a, "layout"_a, "pool"_a, "block_tables"_a, "block_table_stride"_a, "tokens"_a, "q"_a, "out"_a,
          "group"_a, "window"_a, "scale"_a, "soft_cap"_a, "sinks"_a, Unlocked());
}

void bind_tape(nb::module_& m) {
    nb::class_<Tape>(m, "Tape", "Calls of this module with their addresses, to be made again.")
        .def(nb::init<>())
        .def("replay", &Tape::replay, Unlocked())
        .def("__len__", &Tape::size);
    m.def("record_on", &Tape::record_on, "tape"_a.none(),
          "What this thread calls from now on is also put on the tape; None: on none.");
}

void bind_pointwise(nb::module_& m) {
    m.def("norm",
          [](const Rows& x, const Rows& residual, const Rows& sum, const Rows& out, const Rows& weight, Address bias,
             int64_t rows, int64_t columns, float eps, float offset, bool centred) {
              const Matrix w = matrix(weight);
              const NormArgs args = {matrix(x), matrix(residual), matrix(sum), matrix(out), w.data, w.type, at(bias),
                                     columns, eps, offset, centred};
              Tape::call([args, rows] { norm(args, rows); });
          },
          "x"_a, "residual"_a, "sum"_a, "out"_a, "weight"_a, "bias"_a, "rows"_a, "columns"_a, "eps"_a, "offset"_a,
          "centred"_a, Unlocked());
    m.def("prepare_qkv",
          [](const KVLayout& layout, Address pool, int64_t slot_count, Address slots, const Rows& qkv, int64_t tokens,
             int heads, const Rows& q_norm, Address k_norm, float eps, float offset, Address positions,
             const Rows& cos_sin, int64_t cos_sin_rows, int rotary_dim, bool interleaved) {
              const Matrix norm = matrix(q_norm), table = matrix(cos_sin);
              const QkvArgs args = {{layout, at<char>(pool), at<int64_t>(slots), slot_count, {}, {}}, matrix(qkv),
                                    heads, norm.data, at(k_norm), norm.type, eps, offset, at<int64_t>(positions),
                                    static_cast<const float*>(table.data), table.stride, cos_sin_rows, rotary_dim,
                                    interleaved};
              Tape::call([args, tokens] { prepare_qkv(args, tokens); });
          },
          "layout"_a, "pool"_a, "slot_count"_a, "slots"_a, "qkv"_a, "tokens"_a, "heads"_a, "q_norm"_a, "k_norm"_a,
          "eps"_a, "offset"_a, "positions"_a, "cos_sin"_a, "cos_sin_rows"_a, "rotary_dim"_a, "interleaved"_a,
          Unlocked());
    m.def("gated_act",
          [](const Rows& x, const Rows& out, int64_t rows, int64_t width, int activation) {
              const GatedArgs args = {matrix(x), matrix(out), width, Activation(activation)};
              Tape::call([args, rows] { gated_act(args, rows); });
          },
          "x"_a, "out"_a, "rows"_a, "width"_a, "activation"_a, Unlocked());
    m.def("embed",
          [](const Rows& table, int64_t vocabulary, int64_t columns, Address ids, int64_t count, const Rows& out) {
              const Matrix from = matrix(table), to = matrix(out);
              Tape::call([=] { embed(from, vocabulary, columns, at<int64_t>(ids), count, to); });
          },
          "table"_a, "vocabulary"_a, "columns"_a, "ids"_a, "count"_a, "out"_a, Unlocked());
    m.def("embed_packed",
          [](Address packed, int64_t n, int64_t k, int type, Address ids, int64_t count, const Rows& out) {
              const Matrix to = matrix(out);
              Tape::call([=] { embed_packed(at<char>(packed), n, k, DType(type), at<int64_t>(ids), count, to); });
          },
          "packed"_a, "n"_a, "k"_a, "type"_a, "ids"_a, "count"_a, "out"_a, Unlocked());
    m.def("embed_quantized",
          [](const QuantShape& shape, Address packed, Address ids, int64_t count, const Rows& out) {
              const Matrix to = matrix(out);
              Tape::call([=] { embed_packed(shape, at<char>(packed), at<int64_t>(ids), count, to); });
          },
          "shape"_a, "packed"_a, "ids"_a, "count"_a, "out"_a, Unlocked());
    m.def("argmax",
          [](const Rows& x, int64_t rows, int64_t columns, Address out) {
              const Matrix from = matrix(x);
              Tape::call([=] { argmax(from, rows, columns, at<int64_t>(out)); });
          },
          "x"_a, "rows"_a, "columns"_a, "out"_a, Unlocked());
}

void bind_sampling(nb::module_& m) {
    m.def("sample",
          [](const Rows& logits, int64_t rows, int64_t columns, Address temperature, Address top_k, Address top_p,
             Address min_p, Address uniform, Address out) {
              sample({matrix(logits), columns, at<float>(temperature), at<int32_t>(top_k), at<float>(top_p),
                      at<float>(min_p), at<double>(uniform), at<int64_t>(out)},
                     rows);
          },
          "logits"_a, "rows"_a, "columns"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "uniform"_a, "out"_a,
          Unlocked());
    m.def("logprobs",
          [](const Rows& logits, int64_t rows, int64_t columns, Address chosen, int64_t count, Address ids,
             Address values, Address ranks) {
              logprobs({matrix(logits), columns, at<int64_t>(chosen), count, at<int64_t>(ids), at<float>(values),
                        at<int64_t>(ranks)},
                       rows);
          },
          "logits"_a, "rows"_a, "columns"_a, "chosen"_a, "count"_a, "ids"_a, "values"_a, "ranks"_a, Unlocked());
}

// Seconds for all threads to read the buffer once.
double read_seconds(const Buffer& buffer) {
    const int64_t block = 1 << 20, blocks = int64_t(buffer.size()) / block;
    const std::shared_ptr<Pool> held = current_pool();
    Pool& threads = *held;
    Shares shares(blocks, threads.size());
    std::atomic<int> odd{0};
    const auto start = std::chrono::steady_clock::now();
    threads.run([&](int worker) {
        shares.each(worker, [&](int64_t i) {
            if (kernels().probe_read(at<char>(buffer.address()) + i * block, block) != 0) odd++;
        });
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Operations per second of all threads in chains of dot products that wait for nothing.
double dot_rate(int type, int64_t repeats) {
    const std::shared_ptr<Pool> held = current_pool();
    Pool& threads = *held;
    std::vector<double> done(threads.size());
    const auto start = std::chrono::steady_clock::now();
    threads.run([&](int worker) { done[worker] = kernels().probe_dot(DType(type), repeats); });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    double total = 0;
    for (const double operations : done) total += operations;
    return total / seconds;
}

void bind_probes(nb::module_& m) {
    m.def("read_seconds", &read_seconds, "buffer"_a, Unlocked());
    m.def("dot_rate", &dot_rate, "type"_a, "repeats"_a, Unlocked());
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("sanitized", [] {
#if defined(__SANITIZE_ADDRESS__)
        return true;
#else
        return false;
#endif
    });
    m.def("isas", &usable_isas, "Instruction sets this machine can run, the best last.");
    m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
    m.def("set_isa", &set_isa, "name"_a);
    m.def("threads", [] { return current_pool()->size(); });
    m.def("set_threads", &set_threads, "threads"_a, "cores"_a, "spin_us"_a, Unlocked());
    m.def("near_fetches", [](int64_t rows, int bits) { return trials(bits).decided(rows); }, "rows"_a, "bits"_a,
          "Whether products of so many rows fetch weights of 4, 8 or 16 bits near ahead: 1, 0, or -1 while both are tried.");
    m.def("begin_buffers", &begin_buffers, "bytes"_a, "lead"_a, nb::call_guard<nb::gil_scoped_release>(),
          "Have a thread make memory ready for the next ``bytes`` of buffers, up to ``lead`` ahead of those before the last. "
          "What is left of it goes back with the next call.");
    m.def("set_nodes", &set_nodes, "nodes"_a, "The memory nodes that new buffers use; none: as the system does it.");
    nb::class_<Buffer>(m, "Buffer", "Memory for weights and KV pages: zero until touched, huge pages where allowed.")
        .def(nb::init<size_t, bool>(), "bytes"_a, "spread"_a = false)
        .def_prop_ro("address", &Buffer::address)
        .def_prop_ro("size", &Buffer::size);
    bind_linear(m);
    bind_quant(m);
    bind_attention(m);
    bind_pointwise(m);
    bind_sampling(m);
    bind_tape(m);
    bind_probes(m);
}
