// Bindings: takes Python's arguments apart, checks shapes, releases the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>

#include "cuda_library.h"
#include "kv_move.h"
#include "loader.h"
#include "model.h"
#include "probe.h"
#include "sampler.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvasir {

namespace {

template <class T, size_t kDims>
using Input = nb::ndarray<const T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
template <class T, size_t kDims>
using Output = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* text) {
  if (!condition) throw std::invalid_argument(text);
}

template <class T>
T field(const nb::dict& config, const char* name) {
  if (!config.contains(name)) {
    throw std::invalid_argument(std::string("model shape lacks the field ") + name);
  }
  return nb::cast<T>(config[name]);
}

Activation activation_from(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  throw std::invalid_argument("model shape: unknown activation '" + name + "'");
}

KvFormat kv_format_from(const std::string& name) {
  if (name == "bf16") return KvFormat::kPlain;
  if (name == "int8") return KvFormat::kInt8;
  throw std::invalid_argument("unknown KV format '" + name + "'; there are: bf16, int8");
}

void read_layers(const nb::dict& config, ModelShape* shape) {
  for (const auto& value : field<nb::list>(config, "ropes")) {
    const nb::dict rope = nb::cast<nb::dict>(value);
    shape->ropes.push_back(
        {field<std::vector<float>>(rope, "inverse_frequencies"), field<float>(rope, "scale")});
  }
  for (const auto& value : field<nb::list>(config, "layers")) {
    const nb::dict layer = nb::cast<nb::dict>(value);
    shape->layers.push_back(
        {field<int>(layer, "window"), field<int>(layer, "rope"), field<bool>(layer, "is_sparse")});
  }
}

ModelShape shape_from(const nb::dict& config) {
  ModelShape shape;
  shape.num_layers = field<int>(config, "num_layers");
  shape.hidden_size = field<int>(config, "hidden_size");
  shape.num_heads = field<int>(config, "num_heads");
  shape.num_kv_heads = field<int>(config, "num_kv_heads");
  shape.head_dim = field<int>(config, "head_dim");
  shape.intermediate_size = field<int>(config, "intermediate_size");
  shape.vocab_size = field<int>(config, "vocab_size");
  shape.num_experts = field<int>(config, "num_experts");
  shape.num_experts_per_token = field<int>(config, "num_experts_per_token");
  shape.rms_norm_eps = field<float>(config, "rms_norm_eps");
  shape.has_tied_embeddings = field<bool>(config, "has_tied_embeddings");
  shape.has_qkv_bias = field<bool>(config, "has_qkv_bias");
  shape.has_output_bias = field<bool>(config, "has_output_bias");
  shape.has_qk_norm = field<bool>(config, "has_qk_norm");
  shape.has_post_norms = field<bool>(config, "has_post_norms");
  shape.has_scaled_experts = field<bool>(config, "has_scaled_experts");
  shape.expert_size = field<int>(config, "expert_size");
  shape.norm_offset = field<float>(config, "norm_offset");
  shape.embedding_scale = field<float>(config, "embedding_scale");
  shape.query_scale = field<float>(config, "query_scale");
  shape.score_cap = field<float>(config, "score_cap");
  shape.logit_cap = field<float>(config, "logit_cap");
  shape.activation = activation_from(field<std::string>(config, "activation"));
  read_layers(config, &shape);
  return shape;
}

using Bytes = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>;
using Weight = nb::ndarray<const uint16_t, nb::c_contig, nb::device::cpu>;

using Tokens = nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>;

Tokens draw(const RunRows& run, Input<float, 2> logits, Input<float, 1> temperature,
            Input<int32_t, 1> top_k, Input<float, 1> top_p, Input<uint64_t, 1> seed,
            Input<int64_t, 1> position) {
  const size_t rows = logits.shape(0);
  require(temperature.shape(0) == rows && top_k.shape(0) == rows && top_p.shape(0) == rows &&
              seed.shape(0) == rows && position.shape(0) == rows,
          "sampling options must have one entry per row of logits");
  require(rows <= INT32_MAX && logits.shape(1) > 0 && logits.shape(1) <= INT32_MAX,
          "logits need columns");
  const SampleBatch batch = {
      logits.data(),      static_cast<int>(rows), static_cast<int>(logits.shape(1)),
      temperature.data(), top_k.data(),           top_p.data(),
      seed.data(),        position.data()};
  auto ids = std::make_unique<int32_t[]>(rows);
  {
    const nb::gil_scoped_release no_gil;
    sample(batch, run, ids.get());
  }
  int32_t* data = ids.release();
  const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<int32_t*>(p); });
  return Tokens(data, {rows}, owner);
}

void run_here(int count, const std::function<void(int)>& body) {
  for (int row = 0; row < count; ++row) body(row);
}

// The model with the Python objects whose memory it reads.
class PyModel {
 public:
  PyModel(const nb::dict& config, const nb::dict& tensors, const std::string& isa,
          const std::string& kv, const std::string& weights, int num_threads,
          const nb::object& progress, const std::optional<Input<uint8_t, 1>>& kept,
          bool is_balanced)
      : kept_(kept) {
    TensorMap map;
    for (const auto& [name, value] : tensors) {
      const Weight weight = nb::cast<Weight>(value, false);
      require(reinterpret_cast<uintptr_t>(weight.data()) % alignof(uint16_t) == 0,
              "a weight's memory is not aligned");
      Tensor tensor{weight.data(), {}};
      for (size_t i = 0; i < weight.ndim(); ++i) tensor.dims.push_back(weight.shape(i));
      map.emplace(nb::cast<std::string>(name), std::move(tensor));
    }
    const Progress report = [&](size_t done, size_t total) {
      const nb::gil_scoped_acquire gil;
      progress(done, total);
    };
    const ModelShape shape = shape_from(config);
    const ModelOptions options = {isa, kv_format_from(kv), weight_format_of(weights), num_threads,
                                  is_balanced};
    {
      const nb::gil_scoped_release no_gil;
      const Progress told = progress.is_none() ? Progress() : report;
      if (isa == kCudaPath) {
        require(options.kv == KvFormat::kPlain && options.weights == WeightFormat::kBf16,
                "CUDA devices keep weights and KV in bf16");
        model_ = load_cuda_model(shape, map, told);
      } else {
        const std::span<const uint8_t> packed =
            kept ? std::span(kept->data(), kept->size()) : std::span<const uint8_t>();
        model_ = std::make_unique<Model>(shape, map, options, told, packed);
      }
    }
    const bool is_in_head = shape.has_tied_embeddings && options.weights == WeightFormat::kBf16;
    if (!is_in_head) embeddings_ = tensors["model.embed_tokens.weight"];
  }

  void attach_pool(Output<uint8_t, 2> data, Output<uint32_t, 1> ready,
                   Output<uint32_t, 1> progress) {
    require(ready.shape(0) == data.shape(0), "ready must have one entry per block");
    require(progress.shape(0) == 1, "progress must have one entry");
    require(data.shape(0) > 0 && data.shape(0) <= INT32_MAX, "the pool needs at least one block");
    KvPool pool;
    pool.data = data.data();
    pool.ready = ready.data();
    pool.progress = progress.data();
    pool.num_blocks = static_cast<int>(data.shape(0));
    pool.block_bytes = data.shape(1);
    model_->attach_pool(pool);
    pool_arrays_ = nb::make_tuple(data, ready, progress);
  }

  void forward(Input<int32_t, 1> token_ids, Input<int32_t, 1> positions,
               Input<int32_t, 1> seq_token_counts, Input<int32_t, 2> block_tables,
               Input<int32_t, 1> output_rows, Output<float, 2> logits, Input<int32_t, 1> completes,
               Input<int32_t, 1> arrived, std::optional<int> num_layers) {
    require(positions.shape(0) == token_ids.shape(0), "positions must be as long as token_ids");
    require(block_tables.shape(0) == seq_token_counts.shape(0),
            "block_tables must have one row per sequence");
    require(logits.shape(0) == output_rows.shape(0), "logits must have one row per output row");
    require(logits.shape(1) == static_cast<size_t>(model_->shape().vocab_size),
            "logits must have one column per token of the vocabulary");
    require(token_ids.shape(0) <= kStepTokensMax && output_rows.shape(0) <= kStepTokensMax,
            "a step has too many tokens");
    Step step{};
    step.token_ids = token_ids.data();
    step.positions = positions.data();
    step.num_tokens = static_cast<int>(token_ids.shape(0));
    step.num_layers = num_layers.value_or(model_->shape().num_layers);
    step.seq_token_counts = seq_token_counts.data();
    step.num_seqs = static_cast<int>(seq_token_counts.shape(0));
    step.block_tables = block_tables.data();
    step.table_width = static_cast<int>(block_tables.shape(1));
    step.output_rows = output_rows.data();
    step.num_outputs = static_cast<int>(output_rows.shape(0));
    step.logits = logits.data();
    step.completes = completes.data();
    step.num_completes = static_cast<int>(completes.shape(0));
    step.arrived = arrived.data();
    step.num_arrived = static_cast<int>(arrived.shape(0));
    const nb::gil_scoped_release no_gil;
    model_->forward(step);
  }

  Tokens sample(Input<float, 2> logits, Input<float, 1> temperature, Input<int32_t, 1> top_k,
                Input<float, 1> top_p, Input<uint64_t, 1> seed, Input<int64_t, 1> position) {
    const RunRows run = [&](int count, const std::function<void(int)>& body) {
      model_->for_each_row(count, body);
    };
    return draw(run, logits, temperature, top_k, top_p, seed, position);
  }

  void move_kv(Input<int32_t, 1> source_blocks, int source_first, Input<int32_t, 1> target_blocks,
               int target_first, int count) {
    const KvMove move = {{source_blocks.data(), source_blocks.shape(0), source_first, count},
                         {target_blocks.data(), target_blocks.shape(0), target_first, count}};
    const nb::gil_scoped_release no_gil;
    model_->move_kv(move);
  }

  void read_kv(int layer, Input<int32_t, 1> blocks, int first, Output<float, 2> out) {
    const ModelShape& shape = model_->shape();
    require(layer >= 0 && layer < shape.num_layers, "the model has no such layer");
    require(out.shape(1) == 2 * static_cast<size_t>(shape.kv_size()),
            "out must have one column per element of K and V");
    require(out.shape(0) <= kStepTokensMax, "too many tokens are read");
    const nb::gil_scoped_release no_gil;
    const KvSpan span = {blocks.data(), blocks.shape(0), first, static_cast<int>(out.shape(0))};
    model_->read_kv(layer, span, out.data());
  }

  std::string isa() const { return model_->path(); }
  int num_threads() const { return model_->num_threads(); }
  size_t weight_bytes() const { return model_->weight_bytes(); }
  size_t layer_bytes() const { return model_->layer_bytes(); }
  std::span<const uint8_t> packed() const { return model_->packed(); }

 private:
  static constexpr size_t kStepTokensMax = size_t{1} << 16;

  std::optional<Input<uint8_t, 1>> kept_;
  std::unique_ptr<Device> model_;
  nb::object embeddings_;
  nb::object pool_arrays_;
};

}  // namespace

}  // namespace kvasir

namespace kvasir {
void bind_products(nb::module_& m);  // product_module.cpp
}

NB_MODULE(_native, m) {
  using namespace kvasir;
  m.doc() = "Forward pass and sampler, native.";
  m.def("cpu_paths", runnable_paths, "Kernel paths that run on this processor, best last.");
  m.def("model_paths", model_paths, "Paths by slow models of instructions, for tests.");
  m.def(
      "kv_element_bytes",
      [](const std::string& isa, const std::string& kv) {
        const KvFormat format = kv_format_from(kv);
        if (isa == kCudaPath) return int{sizeof(uint16_t)};
        return kernels_of(isa).kv[static_cast<int>(format)].element_bytes;
      },
      "isa"_a, "kv"_a = "bf16",
      "Bytes of one KV element on a path; ValueError if the path does not run here.");
  m.def(
      "packed_bytes",
      [](const nb::dict& config, const std::string& weights) {
        return packed_bytes(shape_from(config), weight_format_of(weights));
      },
      "config"_a, nb::kw_only(), "weights"_a, "Bytes of a model's weights once packed.");
  m.def(
      "sample",
      [](Input<float, 2> logits, Input<float, 1> temperature, Input<int32_t, 1> top_k,
         Input<float, 1> top_p, Input<uint64_t, 1> seed, Input<int64_t, 1> position) {
        return draw(run_here, logits, temperature, top_k, top_p, seed, position);
      },
      nb::kw_only(), "logits"_a.noconvert(), "temperature"_a.noconvert(), "top_k"_a.noconvert(),
      "top_p"_a.noconvert(), "seed"_a.noconvert(), "position"_a.noconvert());
  m.def("philox_uniform", philox_uniform, "seed"_a, "position"_a);

  nb::class_<PyModel>(m, "Model")
      .def(nb::init<const nb::dict&, const nb::dict&, const std::string&, const std::string&,
                    const std::string&, int, const nb::object&,
                    const std::optional<Input<uint8_t, 1>>&, bool>(),
           "config"_a, "tensors"_a, nb::kw_only(), "isa"_a, "kv"_a = "bf16", "weights"_a = "bf16",
           "num_threads"_a, "progress"_a = nb::none(), "kept"_a = nb::none(),
           "is_balanced"_a = false)
      .def("attach_pool", &PyModel::attach_pool, "data"_a.noconvert(), "ready"_a.noconvert(),
           "progress"_a.noconvert())
      .def("forward", &PyModel::forward, nb::kw_only(), "token_ids"_a.noconvert(),
           "positions"_a.noconvert(), "seq_token_counts"_a.noconvert(),
           "block_tables"_a.noconvert(), "output_rows"_a.noconvert(), "logits"_a.noconvert(),
           "completes"_a.noconvert(), "arrived"_a.noconvert(), "num_layers"_a = nb::none())
      .def("sample", &PyModel::sample, nb::kw_only(), "logits"_a.noconvert(),
           "temperature"_a.noconvert(), "top_k"_a.noconvert(), "top_p"_a.noconvert(),
           "seed"_a.noconvert(), "position"_a.noconvert())
      .def("move_kv", &PyModel::move_kv, nb::kw_only(), "source_blocks"_a.noconvert(),
           "source_first"_a, "target_blocks"_a.noconvert(), "target_first"_a, "count"_a)
      .def("read_kv", &PyModel::read_kv, nb::kw_only(), "layer"_a, "blocks"_a.noconvert(),
           "first"_a, "out"_a.noconvert())
      .def_prop_ro("isa", &PyModel::isa)
      .def_prop_ro("num_threads", &PyModel::num_threads)
      .def_prop_ro("weight_bytes", &PyModel::weight_bytes)
      .def_prop_ro("layer_bytes", &PyModel::layer_bytes)
      .def_prop_ro("packed", [](nb::handle self) {
        const std::span<const uint8_t> packed = nb::cast<PyModel&>(self).packed();
        return Bytes(packed.data(), {packed.size()}, self);
      });

  nb::class_<MemoryProbe>(m, "MemoryProbe")
      .def(nb::init<size_t, int>(), nb::kw_only(), "num_bytes"_a, "num_threads"_a)
      .def("read", &MemoryProbe::read, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<PeakProbe>(m, "PeakProbe")
      .def(nb::init<const std::string&, const std::string&, int>(), nb::kw_only(), "isa"_a,
           "weights"_a, "num_threads"_a)
      .def("run", &PeakProbe::run, nb::call_guard<nb::gil_scoped_release>());
  bind_products(m);
}
